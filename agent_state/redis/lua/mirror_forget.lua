-- Forget what has been gone for long. KEYS: index. ARGV: seconds, then for each: field, entry.
local now = tonumber(redis.call('TIME')[1])
for at = 2, #ARGV, 2 do
  local entry = redis.call('HGET', KEYS[1], ARGV[at])
  local since = entry == ARGV[at + 1] and string.match(entry, ' gone (%d+)$')
  if since and now - tonumber(since) >= tonumber(ARGV[1]) then
    redis.call('HDEL', KEYS[1], ARGV[at])
  end
end
return 'ok'
