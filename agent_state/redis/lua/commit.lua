-- Makes commits one after another, each atomically.
--
-- KEYS: the writer's record, notices, kinds, locks; then for each put, delete or check its
--   document and index, for each append its log, dedupe keys and index.
-- ARGV: writer, batch number, seconds to keep the writer's record and the revision of a deleted
--   document, notices to keep, time, "1" if replicas are to confirm; then for each commit the
--   number of its changes, and for each change: name of its lock, the lock's token if it is held,
--   and
--     put     kind key expected body checksum schema meta
--     delete  kind key expected
--     check   kind key expected
--     append  kind key body checksum dedupe_key ("" for none, else "=" and the key) expected
-- Returns the server's time in microseconds, and a line for each commit: "ok" and a number for
--   each change ("=" before the revision of a put that changed nothing), or the reason of the
--   refusal and the number of the change: "conflict", "newer", "locked", "lost", "error".
--
-- Redis undoes nothing, so every check comes before a commit's first write. Redis itself refuses
-- only the first write of a script (full, read-only, …); that write is tried for each commit.

local writer, number = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local micros = string.format('%.0f', time[1] * 1000000 + time[2])
local millis = time[1] * 1000 + math.floor(time[2] / 1000)

local before = redis.call('HMGET', KEYS[1], 'number', 'lines')
if before[1] and tonumber(before[1]) >= number then
  if tonumber(before[1]) > number then return {micros, 'late'} end
  return {micros, before[2]}
end

redis.call('SCARD', KEYS[3])  -- an error of type is raised here, before anything is written
local any_locks = redis.call('HLEN', KEYS[4]) > 0
local stream = redis.pcall('XINFO', 'STREAM', KEYS[2])
if stream.err and not string.find(stream.err, 'no such key', 1, true) then return stream end

local k, a = 5, 8
local changes, written = {}, false

local function field_of(info, name)
  for i = 1, #info, 2 do
    if info[i] == name then return info[i + 1] end
  end
end

local function integer(text)
  local value = tonumber(text)
  if value and value >= 1 and value < 9007199254740992 and value == math.floor(value) then
    return value
  end
  return 1  -- a person has removed or broken it
end

local function read_document(key)
  local found = redis.pcall('HMGET', key, 'revision', 'checksum', 'schema', 'meta')
  if found.err then return nil, found.err end
  local there = found[2] or redis.call('HEXISTS', key, 'body') == 1
  local revision = found[1] and integer(found[1]) or (there and 1 or 0)
  if not there then return {floor = revision, revision = 0} end
  return {floor = revision, revision = revision, checksum = found[2], schema = found[3] or '',
          meta = found[4] or ''}
end

local function is_newer(stored, given)
  local theirs, newer = string.match(stored, '^(.*)/(%d+)$')
  local ours, version = string.match(given, '^(.*)/(%d+)$')
  return theirs and theirs == ours and tonumber(newer) > tonumber(version)
end

local function refusal_by_lock(place, held)
  local lock = any_locks and redis.call('HGET', KEYS[4], place)
  local value, owner, until_ms
  if lock then
    value, owner, until_ms = string.match(lock, '^((.-) %S+) (%d+)$')
    if value and tonumber(until_ms) <= millis and value ~= held then value = nil end
  end
  if held ~= '' then
    if value ~= held then return 'lost' end
  elseif value and owner ~= writer then
    return 'locked ' .. math.max(1, tonumber(until_ms) - millis)
  end
end

-- Plans a commit without writing. Returns a refusal, or nil, its numbers, writes and notices.
local function plan(count)
  local numbers, writes, notices, documents, logs = {}, {}, {}, {}, {}
  local refused

  local function change(index)
    local place, held, op, kind, text = ARGV[a], ARGV[a + 1], ARGV[a + 2], ARGV[a + 3], ARGV[a + 4]
    local lock = not refused and refusal_by_lock(place, held)
    if lock then
      local word, rest = string.match(lock, '^(%S+) ?(.*)$')
      refused = word .. ' ' .. index .. ' ' .. rest
    end
    if op == 'append' then
      local key, ids, listing = KEYS[k], KEYS[k + 1], KEYS[k + 2]
      local body, checksum, dedupe = ARGV[a + 5], ARGV[a + 6], ARGV[a + 7]
      local wanted = ARGV[a + 8]
      k, a = k + 3, a + 9
      if refused then return end
      local log = logs[key]
      if not log then
        local info = redis.pcall('XINFO', 'STREAM', key)
        local ids_type, listing_type = redis.call('TYPE', ids).ok, redis.call('TYPE', listing).ok
        if info.err and not string.find(info.err, 'no such key', 1, true) then
          refused = 'error ' .. index .. ' ' .. info.err
          return
        end
        if (ids_type ~= 'none' and ids_type ~= 'hash')
          or (listing_type ~= 'none' and listing_type ~= 'zset') then
          refused = 'error ' .. index .. ' WRONGTYPE of an index of ' .. key
          return
        end
        local last = info.err and '0-0' or field_of(info, 'last-generated-id')
        log = {last = tonumber(string.match(last, '^(%d+)')), ids = {}, new = info.err ~= nil}
        logs[key] = log
      end
      if dedupe ~= '' then
        local known = log.ids[dedupe] or redis.call('HGET', ids, string.sub(dedupe, 2))
        if known then
          numbers[index] = known
          return
        end
      end
      if log.last >= 9007199254740991 then
        refused = 'error ' .. index .. ' the numbers of ' .. key .. ' are used up'
        return
      end
      if wanted ~= '' and tonumber(wanted) ~= log.last + 1 then
        refused = 'conflict ' .. index .. ' ' .. string.format('%.0f', log.last + 1)
        return
      end
      log.last = log.last + 1
      local seq = string.format('%.0f', log.last)
      numbers[index] = seq
      local entry = {'XADD', key, seq .. '-0', 'body', body, 'checksum', checksum}
      if dedupe ~= '' then
        log.ids[dedupe] = seq
        entry[8], entry[9] = 'dedupe', string.sub(dedupe, 2)
      end
      writes[#writes + 1] = entry
      if dedupe ~= '' then writes[#writes + 1] = {'HSET', ids, string.sub(dedupe, 2), seq} end
      if log.new then
        writes[#writes + 1] = {'ZADD', listing, 0, text}
        log.new = false
      end
      return
    end

    local key, listing, expected = KEYS[k], KEYS[k + 1], ARGV[a + 5]
    local body, checksum, schema, meta = ARGV[a + 6], ARGV[a + 7], ARGV[a + 8], ARGV[a + 9]
    k, a = k + 2, a + (op == 'put' and 10 or 6)
    if refused then return end
    local document = documents[key]
    if not document then
      local failure
      document, failure = read_document(key)
      if failure then
        refused = 'error ' .. index .. ' ' .. failure
        return
      end
      documents[key] = document
    end
    local actual = document.revision
    if expected ~= '' and tonumber(expected) ~= actual then
      refused = 'conflict ' .. index .. ' ' .. string.format('%.0f', actual)
      return
    end
    if op == 'check' then
      numbers[index] = string.format('%.0f', actual)
      return
    end
    if op == 'delete' then
      numbers[index] = string.format('%.0f', actual)
      if actual > 0 then
        writes[#writes + 1] = {'DEL', key}
        writes[#writes + 1] = {'HSET', key, 'revision', numbers[index]}
        writes[#writes + 1] = {'EXPIRE', key, ARGV[4]}
        writes[#writes + 1] = {'ZREM', listing, text}
        notices[#notices + 1] = kind .. ' 0 ' .. text
        documents[key] = {floor = actual, revision = 0}
      end
      return
    end
    if actual > 0 then
      if document.schema ~= schema and is_newer(document.schema, schema) then
        refused = 'newer ' .. index .. ' ' .. document.schema
        return
      end
      if document.checksum == checksum and document.schema == schema and document.meta == meta
        and (document.body or redis.call('HGET', key, 'body')) == body then
        numbers[index] = '=' .. string.format('%.0f', actual)
        return
      end
    elseif redis.call('TYPE', listing).ok ~= 'zset' and redis.call('EXISTS', listing) == 1 then
      refused = 'error ' .. index .. ' WRONGTYPE ' .. listing
      return
    end
    local revision = string.format('%.0f', document.floor + 1)
    numbers[index] = revision
    writes[#writes + 1] = {'HSET', key, 'revision', revision, 'body', body, 'checksum', checksum,
                           'schema', schema, 'meta', meta, 'saved_at', ARGV[6]}
    if actual == 0 then
      if document.floor > 0 then writes[#writes + 1] = {'PERSIST', key} end
      writes[#writes + 1] = {'ZADD', listing, 0, text}
      writes[#writes + 1] = {'SADD', KEYS[3], kind}
    end
    notices[#notices + 1] = kind .. ' ' .. revision .. ' ' .. text
    documents[key] = {floor = document.floor + 1, revision = document.floor + 1, body = body,
                      checksum = checksum, schema = schema, meta = meta}
  end

  for index = 1, count do change(index) end
  return refused, numbers, writes, notices
end

local lines = {}
while a <= #ARGV do
  local count = tonumber(ARGV[a])
  a = a + 1
  local refused, numbers, writes, notices = plan(count)
  if not refused and #writes > 0 then
    local first = redis.pcall(unpack(writes[1]))
    if type(first) == 'table' and first.err then
      refused = 'error 1 ' .. first.err
    else
      written = true
      for i = 2, #writes do redis.call(unpack(writes[i])) end
      for _, notice in ipairs(notices) do changes[#changes + 1] = notice end
    end
  end
  lines[#lines + 1] = refused or ('ok ' .. table.concat(numbers, ' '))
end

local result = table.concat(lines, '\n')
if written then
  if #changes > 0 then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'writer', writer, 'number', ARGV[2],
               'before', stream.err and '0-0' or field_of(stream, 'last-generated-id'),
               'changes', table.concat(changes, '\n'))
  end
end
if written or ARGV[7] == '1' then
  -- WAIT is about the last write of its connection, so commits that change nothing write too.
  local kept = redis.pcall('HSET', KEYS[1], 'number', ARGV[2], 'lines', result)
  if type(kept) == 'table' and kept.err then return kept end
  redis.call('EXPIRE', KEYS[1], ARGV[3])
end
return {micros, result}
