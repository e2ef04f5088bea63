-- Adds records to the copy of a log that ends with a given record, or removes the copy.
-- KEYS: index, log. ARGV: operation, mark, field, then for
--   append  ttl in ms (0: none), ttl of the index, the number of the copy's last record (0: the
--           copy is replaced), then for each record: number, body, dedupe key ("" for none, else
--           "=" and the key)
-- Returns {"mark", mark} if the index is not the known one, {"moved", last} if the copy ends
-- elsewhere, else {"ok", last}.
local mark = redis.call('HGET', KEYS[1], '/mark')
local field = ARGV[3]
if mark ~= ARGV[2] then return {'mark', mark or ''} end
local type = redis.call('TYPE', KEYS[2]).ok
if ARGV[1] == 'drop' then
  if type == 'stream' then redis.call('DEL', KEYS[2]) end
  redis.call('HDEL', KEYS[1], field)
  return {'ok', '0'}
end
local ttl = tonumber(ARGV[4])
local last = redis.call('HGET', KEYS[1], field) or '0'
if last ~= ARGV[6] then return {'moved', last} end
if last == '0' then
  if type ~= 'stream' and type ~= 'none' then
    return redis.error_reply('WRONGTYPE not ours: ' .. type)
  end
  redis.call('DEL', KEYS[2])
end
for at = 7, #ARGV, 3 do
  last = ARGV[at]
  if ARGV[at + 2] == '' then
    redis.call('XADD', KEYS[2], last .. '-0', 'body', ARGV[at + 1])
  else
    redis.call('XADD', KEYS[2], last .. '-0', 'body', ARGV[at + 1],
      'dedupe_id', string.sub(ARGV[at + 2], 2))
  end
end
redis.call('HSET', KEYS[1], field, last)
if ttl > 0 then
  redis.call('PEXPIRE', KEYS[2], ttl)
  redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[5]))
end
return {'ok', last}
