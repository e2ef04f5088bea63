-- Begin the index of a kind, or find the one that is there.
-- KEYS: index, changes. ARGV: mark for a new index, and whether to begin one anyway ("1").
-- Gives the mark of the index.
local type = redis.call('TYPE', KEYS[2]).ok
if type ~= 'stream' and type ~= 'none' then
  return redis.error_reply('WRONGTYPE not ours: ' .. KEYS[2] .. ' is a ' .. type)
end
local mark = redis.call('HGET', KEYS[1], '/mark')
if not mark or ARGV[2] == '1' then
  mark = ARGV[1]
  redis.call('HSET', KEYS[1], '/mark', mark)
  redis.call('HSETNX', KEYS[1], '/writes', '0')
end
return mark
