"""What has to happen at once in the server, as Lua scripts, and under which names weft keeps what.

| key | what |
| --- | --- |
| `weft:identity` | tells this database from an emptied one |
| `weft:v:` | `w` and a value; `l`, a lease's holder (16 bytes) and value; or `p`, name, `/`, number of parts |
| `weft:p:` | a part of a large value: name, `:`, number |
| `weft:c:` | a counter |
| `weft:s:` | the sum that an addition gave, by its token, so that it counts once |

A channel of the same name as a value's key, after `weft:DATABASE:`, says that it has changed.
"""

from __future__ import annotations

IDENTITY, VALUE, PART, COUNTER, SUM = "weft:identity", "weft:v:", "weft:p:", "weft:c:", "weft:s:"
PLAIN, LEASED, PARTED = b"w", b"l", b"p"
TOKEN_BYTES = 16
READING_MS = 60_000
"""So long the parts of a value that was replaced stay for those who are reading them."""
WRITING_MS = 600_000
"""So long parts without a value stay: those of a writer that died."""
SUMMED_MS = 300_000
"""An addition that is asked again within this time counts once."""
LOST, LATE = "WEFTLOST", "WEFTLATE"
"""What scripts answer when the database is another one, and when parts are gone before they are all there."""

# Every script has the identity first among its keys and arguments.
_HEAD = f"""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('{LOST}') end
local function drop(value)
  local name, count = string.match(value or '', '^p(.*)/(%d+)$')
  for part = 0, (tonumber(count) or 0) - 1 do redis.call('PEXPIRE', '{PART}' .. name .. ':' .. part, {READING_MS}) end
end
"""
# Keys: value. Arguments: channel, what to store, milliseconds (0: for ever).
PUT = (
    _HEAD
    + f"""
local name, count = string.match(ARGV[3], '^p(.*)/(%d+)$')
for part = 0, (tonumber(count) or 0) - 1 do
  local key = '{PART}' .. name .. ':' .. part
  if redis.call('EXISTS', key) == 0 then return redis.error_reply('{LATE}') end
  redis.call('PERSIST', key)
end
local old = redis.call('GET', KEYS[2])
if old ~= ARGV[3] then drop(old) end
if ARGV[4] == '0' then redis.call('SET', KEYS[2], ARGV[3])
else redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4]) end
redis.call('PUBLISH', ARGV[2], '')
return 1
"""
)
# Keys: value, counter. Arguments: channel.
DELETE = (
    _HEAD
    + """
drop(redis.call('GET', KEYS[2]))
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('PUBLISH', ARGV[2], '')
return 1
"""
)
# Keys: counter, sum. Arguments: amount. Sums are text: Lua's numbers are floats.
ADD = (
    _HEAD
    + f"""
local sum = redis.call('GET', KEYS[3])
if not sum then
  redis.call('INCRBY', KEYS[2], ARGV[2])
  sum = redis.call('GET', KEYS[2])
  redis.call('SET', KEYS[3], sum, 'PX', {SUMMED_MS})
end
return sum
"""
)
# Keys: value. Arguments: holder, milliseconds.
RENEW = (
    _HEAD
    + f"""
if redis.call('GETRANGE', KEYS[2], 0, {TOKEN_BYTES}) ~= 'l' .. ARGV[2] then return 0 end
return redis.call('PEXPIRE', KEYS[2], ARGV[3])
"""
)
# Keys: value. Arguments: holder, channel.
RELEASE = (
    _HEAD
    + f"""
if redis.call('GETRANGE', KEYS[2], 0, {TOKEN_BYTES}) ~= 'l' .. ARGV[2] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('PUBLISH', ARGV[3], '')
return 1
"""
)
