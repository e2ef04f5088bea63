-- Creates the index of a kind, or finds the existing one.
-- KEYS: index, changes. ARGV: mark for a new index, "1" to replace an existing index by an empty
--   one, which counts its writes on. Returns the mark of the index.
local type = redis.call('TYPE', KEYS[2]).ok
if type ~= 'stream' and type ~= 'none' then
  return redis.error_reply('WRONGTYPE not ours: ' .. KEYS[2] .. ' is a ' .. type)
end
local mark = redis.call('HGET', KEYS[1], '/mark')
if not mark or ARGV[2] == '1' then
  mark = ARGV[1]
  local writes = redis.call('HGET', KEYS[1], '/writes') or '0'
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], '/mark', mark, '/writes', writes)
end
return mark
