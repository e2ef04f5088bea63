-- Drops the locks of the dead. KEYS: locks. Returns the server's time in microseconds.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local locks = redis.call('HGETALL', KEYS[1])
for i = 1, #locks, 2 do
  local until_ms = string.match(locks[i + 1], ' (%d+)$')
  if not until_ms or tonumber(until_ms) <= now then redis.call('HDEL', KEYS[1], locks[i]) end
end
return string.format('%.0f', time[1] * 1000000 + time[2])
