-- Add records to the copy of a log, if it ends where we think it does.
-- KEYS: index, log. ARGV: mark, ttl in ms (0: none), the ttl of the index, field, the number of
--   the last record there, then for each record: number, body, dedupe id ('' for none; else
--   '=' and the id).
-- Gives {'mark', mark}, {'moved', last} or {'ok', last}. With last 0 what is there is begun anew.
local mark = redis.call('HGET', KEYS[1], '/mark')
if mark ~= ARGV[1] then return {'mark', mark or ''} end
local last = redis.call('HGET', KEYS[1], ARGV[4]) or '0'
if last ~= ARGV[5] then return {'moved', last} end
if last == '0' then
  local type = redis.call('TYPE', KEYS[2]).ok
  if type ~= 'stream' and type ~= 'none' then
    return redis.error_reply('WRONGTYPE not ours: ' .. type)
  end
  if type == 'stream' then redis.call('DEL', KEYS[2]) end
end
for at = 6, #ARGV, 3 do
  last = ARGV[at]
  if ARGV[at + 2] == '' then
    redis.call('XADD', KEYS[2], last .. '-0', 'body', ARGV[at + 1])
  else
    redis.call('XADD', KEYS[2], last .. '-0', 'body', ARGV[at + 1],
      'dedupe_id', string.sub(ARGV[at + 2], 2))
  end
end
redis.call('HSET', KEYS[1], ARGV[4], last)
local ttl = tonumber(ARGV[2])
if ttl > 0 then
  redis.call('PEXPIRE', KEYS[2], ttl)
  redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]))
end
return {'ok', last}
