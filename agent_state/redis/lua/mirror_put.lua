-- Writes documents of one kind, each only if its last write is the expected one.
-- KEYS: index, changes, then each document.
-- ARGV: mark, ttl in ms (0: none), ttl of the index, the number of notices to keep; then for each
--   document: field, the number of its expected last write ("" for none), revision ("" to delete
--   it), checksum, saved_at, schema, body.
-- Returns {"mark", mark} if the index is not the known one, else {"ok"} and for each document
--   "ok <write>", "moved <entry>" or "error <message>".
local mark = redis.call('HGET', KEYS[1], '/mark')
if mark ~= ARGV[1] then return {'mark', mark or ''} end
local ttl, index_ttl = tonumber(ARGV[2]), tonumber(ARGV[3])
local replies = {'ok'}
for i = 3, #KEYS do
  local at = 5 + (i - 3) * 7
  local field, revision, checksum = ARGV[at], ARGV[at + 2], ARGV[at + 3]
  local entry = redis.call('HGET', KEYS[1], field) or ''
  local reply
  if string.match(entry, '^%d*') ~= ARGV[at + 1] then
    reply = 'moved ' .. entry
  else
    local done
    if revision ~= '' then
      done = redis.pcall('HSET', KEYS[i], 'body', ARGV[at + 6], 'revision', revision,
        'saved_at', ARGV[at + 4], 'schema', ARGV[at + 5], 'checksum', checksum)
    else
      local type = redis.call('TYPE', KEYS[i]).ok
      if type == 'hash' or type == 'none' then
        done = redis.pcall('DEL', KEYS[i])
      else
        done = {err = 'WRONGTYPE not ours: ' .. type}
      end
    end
    if done and type(done) == 'table' and done.err then
      reply = 'error ' .. done.err
    else
      local write = string.format('%.0f', redis.call('HINCRBY', KEYS[1], '/writes', 1))
      if revision ~= '' then
        entry = write .. ' ' .. revision .. ' ' .. checksum
      else
        entry = write .. ' gone ' .. redis.call('TIME')[1]
      end
      redis.call('HSET', KEYS[1], field, entry)
      redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'key', field,
        'revision', revision ~= '' and revision or 'gone')
      if ttl > 0 and revision ~= '' then redis.call('PEXPIRE', KEYS[i], ttl) end
      reply = 'ok ' .. write
    end
  end
  replies[#replies + 1] = reply
end
if ttl > 0 then
  redis.call('PEXPIRE', KEYS[1], index_ttl)
  redis.call('PEXPIRE', KEYS[2], index_ttl)
end
return replies
