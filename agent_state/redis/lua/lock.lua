-- Takes a lock, or takes it again after a reply that was lost.
-- KEYS: locks, the counter of fencing tokens. ARGV: place, owner's mark, milliseconds.
-- Returns {1, value} with the lock, {0, milliseconds} until the one that is in the way expires.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lock = redis.call('HGET', KEYS[1], ARGV[1])
if lock then
  local value, until_ms = string.match(lock, '^(.*) (%d+)$')
  if value and string.match(value, '^(.*):%d+$') == ARGV[2] then
    redis.call('HSET', KEYS[1], ARGV[1], value .. ' ' .. string.format('%.0f', now + ARGV[3]))
    return {1, value}
  end
  if value and tonumber(until_ms) > now then return {0, tonumber(until_ms) - now} end
end
local value = ARGV[2] .. ':' .. string.format('%.0f', redis.call('INCR', KEYS[2]))
redis.call('HSET', KEYS[1], ARGV[1], value .. ' ' .. string.format('%.0f', now + ARGV[3]))
return {1, value}
