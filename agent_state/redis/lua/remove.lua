-- Removes documents and logs, or moves a document to its quarantine key, and notifies watchers.
-- KEYS: notices, then for
--   erase       locks, index of documents, index of logs, then the keys to delete
--   quarantine  document, index, the quarantine key, the key of the reason
-- ARGV: operation, writer, kind, then for
--   erase       name of the lock, its token, the number of documents, then their keys as text and
--               those of the logs. Returns whether the lock was still the caller's.
--   quarantine  key as text, reason, time, the body that was seen ("" for any, else "=" and the
--               body), seconds for which the revision is remembered. Returns whether it was moved.
local operation, writer, kind = ARGV[1], ARGV[2], ARGV[3]

local function notify(changes)
  local stream, before = redis.pcall('XINFO', 'STREAM', KEYS[1]), '0-0'
  for i = 1, #stream, 2 do
    if stream[i] == 'last-generated-id' then before = stream[i + 1] end
  end
  redis.pcall('XADD', KEYS[1], '*', 'writer', writer, 'number', '0', 'before', before,
              'changes', table.concat(changes, '\n'))
end

if operation == 'erase' then
  local lock = redis.call('HGET', KEYS[2], ARGV[4])
  if not lock or string.match(lock, '^(.*) %d+$') ~= ARGV[5] then return 0 end
  local documents, changes = tonumber(ARGV[6]), {}
  for i = 5, #KEYS do redis.call('DEL', KEYS[i]) end
  for i = 7, #ARGV do
    if i - 6 > documents then
      redis.call('ZREM', KEYS[4], ARGV[i])
    else
      redis.call('ZREM', KEYS[3], ARGV[i])
      changes[#changes + 1] = kind .. ' 0 ' .. ARGV[i]
    end
  end
  if #changes > 0 then notify(changes) end
  return 1
end

local text, reason, at, seen, remembered = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
local revision = false
if redis.call('TYPE', KEYS[2]).ok == 'hash' then
  local found = redis.call('HMGET', KEYS[2], 'revision', 'body')
  if not found[2] or (seen ~= '' and '=' .. found[2] ~= seen) then return 0 end
  revision = found[1]
end
redis.call('RENAME', KEYS[2], KEYS[4])
redis.call('HSET', KEYS[5], 'reason', reason, 'at', at, 'kind', kind, 'key', text)
if revision then
  redis.call('HSET', KEYS[2], 'revision', revision)
  redis.call('EXPIRE', KEYS[2], remembered)
end
redis.call('ZREM', KEYS[3], text)
notify({kind .. ' 0 ' .. text})
return 1
