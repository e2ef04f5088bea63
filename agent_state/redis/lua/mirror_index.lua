-- Creates the index of a kind, or removes entries of documents that were deleted long ago.
-- KEYS: index, and for "claim" the stream of changes. ARGV and result:
--   claim   mark for a new index, "1" to replace an existing index by an empty one, which counts
--           its writes on. Returns the mark of the index.
--   forget  seconds, then for each deleted document its field and entry. Returns "ok".
if ARGV[1] == 'forget' then
  local now = tonumber(redis.call('TIME')[1])
  for at = 3, #ARGV, 2 do
    local entry = redis.call('HGET', KEYS[1], ARGV[at])
    local since = entry == ARGV[at + 1] and string.match(entry, ' gone (%d+)$')
    if since and now - tonumber(since) >= tonumber(ARGV[2]) then
      redis.call('HDEL', KEYS[1], ARGV[at])
    end
  end
  return 'ok'
end
local type = redis.call('TYPE', KEYS[2]).ok
if type ~= 'stream' and type ~= 'none' then
  return redis.error_reply('WRONGTYPE not ours: ' .. KEYS[2] .. ' is a ' .. type)
end
local mark = redis.call('HGET', KEYS[1], '/mark')
if not mark or ARGV[3] == '1' then
  mark = ARGV[2]
  local writes = redis.call('HGET', KEYS[1], '/writes') or '0'
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], '/mark', mark, '/writes', writes)
end
return mark
