-- Remove the copy of a log. KEYS: index, log. ARGV: mark, field.
-- Gives 'mark' when the index is not the one we know, else 'ok'.
if redis.call('HGET', KEYS[1], '/mark') ~= ARGV[1] then return 'mark' end
if redis.call('TYPE', KEYS[2]).ok == 'stream' then redis.call('DEL', KEYS[2]) end
redis.call('HDEL', KEYS[1], ARGV[2])
return 'ok'
