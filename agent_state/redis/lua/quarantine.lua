-- Puts a document aside under another key, as it is, with the reason beside it.
-- KEYS: document, index, notices, where to, where the reason goes.
-- ARGV: kind, key, reason, time, the body that was seen ("" for whatever is there, else "=" and
--   the body), seconds for which its revision is remembered, writer. Returns whether it was moved.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local revision = false
if redis.call('TYPE', KEYS[1]).ok == 'hash' then
  local found = redis.call('HMGET', KEYS[1], 'revision', 'body')
  if not found[2] then return 0 end
  if ARGV[5] ~= '' and '=' .. found[2] ~= ARGV[5] then return 0 end
  revision = found[1]
end
redis.call('RENAME', KEYS[1], KEYS[4])
redis.call('HSET', KEYS[5], 'reason', ARGV[3], 'at', ARGV[4], 'kind', ARGV[1], 'key', ARGV[2])
if revision then
  redis.call('HSET', KEYS[1], 'revision', revision)
  redis.call('EXPIRE', KEYS[1], ARGV[6])
end
redis.call('ZREM', KEYS[2], ARGV[2])
local stream = redis.pcall('XINFO', 'STREAM', KEYS[3])
local before = '0-0'
for i = 1, #stream, 2 do
  if stream[i] == 'last-generated-id' then before = stream[i + 1] end
end
redis.pcall('XADD', KEYS[3], '*', 'writer', ARGV[7], 'number', '0', 'before', before,
            'changes', ARGV[1] .. ' 0 ' .. ARGV[2])
return 1
