-- Renews a lock that is still the caller's, or lets it go (0 milliseconds); else does nothing.
-- KEYS: locks. ARGV: place, the lock's value or its owner's mark, milliseconds.
-- Returns whether it was the caller's.
local lock = redis.call('HGET', KEYS[1], ARGV[1])
local value = lock and string.match(lock, '^(.*) %d+$')
if not value then return 0 end
if value ~= ARGV[2] and string.match(value, '^(.*):%d+$') ~= ARGV[2] then return 0 end
if ARGV[3] == '0' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  redis.call('HSET', KEYS[1], ARGV[1], value .. ' ' .. string.format('%.0f', now + ARGV[3]))
end
return 1
