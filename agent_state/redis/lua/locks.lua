-- Takes, extends and cleans up the locks of a store.
-- KEYS: locks, and for "take" the counter of fencing tokens. A lock's field is its name, its value
-- "<token> <expiry in ms>", and a token is "<owner>:<number>". ARGV and result:
--   take    name owner ms    {1, token}, also for a second call of the owner whose first reply was
--                            lost; or {0, ms until the lock in the way expires}
--   extend  name token ms    1, or 0 if the lock is not the caller's any more; 0 ms releases it;
--                            an owner instead of a token is accepted
--   clean                    the server's time in microseconds; expired locks are removed
local operation, name, owner, ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function parse(lock)
  local token, expiry = string.match(lock or '', '^(.*) (%d+)$')
  return token, token and string.match(token, '^(.*):%d+$'), tonumber(expiry)
end

local function store(token)
  redis.call('HSET', KEYS[1], name, token .. ' ' .. string.format('%.0f', now + ms))
  return {1, token}
end

if operation == 'clean' then
  local locks = redis.call('HGETALL', KEYS[1])
  for i = 1, #locks, 2 do
    local _, _, expiry = parse(locks[i + 1])
    if not expiry or expiry <= now then redis.call('HDEL', KEYS[1], locks[i]) end
  end
  return string.format('%.0f', time[1] * 1000000 + time[2])
end

local token, holder, expiry = parse(redis.call('HGET', KEYS[1], name))
if operation == 'extend' then
  if not token or (token ~= owner and holder ~= owner) then return 0 end
  if ms == '0' then
    redis.call('HDEL', KEYS[1], name)
  else
    store(token)
  end
  return 1
end
if holder == owner and token then return store(token) end
if token and expiry > now then return {0, expiry - now} end
return store(owner .. ':' .. string.format('%.0f', redis.call('INCR', KEYS[2])))
