-- Removes documents and logs, or other keys of the store, under a lock that the caller holds.
-- KEYS: locks, index of documents, index of logs, notices; then what to delete.
-- ARGV: place of the lock, its value, writer, kind, how many documents; then their keys as text,
--   and those of the logs. Returns whether the lock was still the caller's.
local lock = redis.call('HGET', KEYS[1], ARGV[1])
if not lock or string.match(lock, '^(.*) %d+$') ~= ARGV[2] then return 0 end
local documents, told = tonumber(ARGV[5]), {}
local stream = redis.pcall('XINFO', 'STREAM', KEYS[4])
for i = 5, #KEYS do redis.call('DEL', KEYS[i]) end
for i = 6, #ARGV do
  if i - 5 > documents then
    redis.call('ZREM', KEYS[3], ARGV[i])
  else
    redis.call('ZREM', KEYS[2], ARGV[i])
    told[#told + 1] = ARGV[4] .. ' 0 ' .. ARGV[i]
  end
end
if #told > 0 then
  local before = '0-0'
  for i = 1, #stream, 2 do
    if stream[i] == 'last-generated-id' then before = stream[i + 1] end
  end
  redis.pcall('XADD', KEYS[4], '*', 'writer', ARGV[3], 'number', '0', 'before', before,
              'changes', table.concat(told, '\n'))
end
return 1
