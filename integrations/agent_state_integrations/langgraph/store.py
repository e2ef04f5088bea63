"""A store for LangGraph: each item is one JSON document, found by namespace, filter or meaning."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

import orjson
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.store.base import (
    BaseStore,
    GetOp,
    IndexConfig,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    ensure_embeddings,
    get_text_at_path,
    tokenize_path,
    validate_op_namespace,
)

from agent_state import RevisionConflictError, StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, as_segment, from_segment
from agent_state.clock import instant, stamp
from agent_state.protocols import Durability, JsonObject
from agent_state_integrations.langgraph.values import ValueCodec

KIND = "langgraph_items"
"""The kind of the items; a key is the namespace and the item's key."""

_Address = tuple[tuple[str, ...], str]
"""A namespace and a key."""
_Vectors = Mapping[str, Sequence[float]]
"""The vector of each indexed field."""


class AgentStateStore(BaseStore):
    """Keeps LangGraph's long-term memory in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``. ``index``:
    LangGraph's ``IndexConfig``, for semantic search. ``ttl``: LangGraph's ``TTLConfig``, in
    minutes; an expired item is never returned, and with ``sweep_interval_minutes`` the batches
    remove them once in so many minutes.

    The operations of a batch see the items as they were before it; its puts are made together or
    not at all. It is a context manager, sync and async, and needs neither.
    """

    __slots__ = (
        "_access",
        "_codec",
        "_fields",
        "_swept",
        "embeddings",
        "index_config",
        "ttl_config",
    )
    supports_ttl = True

    def __init__(
        self,
        state: StateLocation,
        *,
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._codec = ValueCodec(JsonPlusSerializer())
        self._swept: datetime | None = None
        self.ttl_config = ttl
        self.index_config = index
        self.embeddings = ensure_embeddings(index.get("embed")) if index else None
        fields = (index.get("fields") or ["$"]) if index else []
        self._fields = [(path, _tokens(path)) for path in fields]

    # -- life ----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._access.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        self._access.open_blocking()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """Close a directory that was opened here."""
        await self._access.close()

    def close(self) -> None:
        """Close a directory that was opened here."""
        self._access.close_blocking()

    # -- LangGraph's operations ------------------------------------------------------------------

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        batch = _Batch.of(ops)
        if self.embeddings is not None:
            for query in batch.queries:
                batch.queries[query] = self.embeddings.embed_query(query)
            texts = self._texts_of(batch.puts.values())
            if texts:
                vectors = self.embeddings.embed_documents([*texts])
                batch.vectors = _vectors_by_item(texts, vectors)
        return self._access.run_blocking(lambda m: self._execute(m, batch))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        batch = _Batch.of(ops)
        if self.embeddings is not None:
            for query in batch.queries:
                batch.queries[query] = await self.embeddings.aembed_query(query)
            texts = self._texts_of(batch.puts.values())
            if texts:
                vectors = await self.embeddings.aembed_documents([*texts])
                batch.vectors = _vectors_by_item(texts, vectors)
        return await self._access.run(lambda m: self._execute(m, batch))

    async def asweep_ttl(self) -> int:
        """Remove the items that have expired; returns how many."""
        return await self._access.run(self._sweep)

    def sweep_ttl(self) -> int:
        """Remove the items that have expired; returns how many."""
        return self._access.run_blocking(self._sweep)

    # -- on the loop of the state ------------------------------------------------------------------

    async def _execute(self, manager: StatePersistenceManager, batch: _Batch) -> list[Result]:
        results: list[Result] = []
        refresh: dict[_Address, None] = {}
        for op in batch.ops:
            if isinstance(op, GetOp):
                found = await self._load(manager, (op.namespace, op.key))
                results.append(found.item() if found is not None else None)
                if found is not None and op.refresh_ttl:
                    refresh[op.namespace, op.key] = None
            elif isinstance(op, SearchOp):
                matches = await self._search(manager, op, batch.queries.get(op.query or ""))
                results.append([found.search_item(score) for found, score in matches])
                if op.refresh_ttl:
                    refresh |= dict.fromkeys((found.namespace, found.key) for found, _ in matches)
            elif isinstance(op, ListNamespacesOp):
                results.append(await self._namespaces(manager, op))
            else:
                results.append(None)
        if batch.puts:
            await self._put(manager, batch)
        for address in refresh:
            if address not in batch.puts:
                await self._refresh(manager, address)
        await self._sweep_in_time(manager)
        return results

    async def _put(self, manager: StatePersistenceManager, batch: _Batch) -> None:
        while True:
            group = manager.new_group()
            now = manager.clock.now()
            for address, op in batch.puts.items():
                key = document_key(address)
                if op.value is None:
                    group.delete(KIND, key)
                    continue
                stored = await manager.load_with_revision(KIND, key)
                created = stored.state.model_dump().get("created_at") if stored else None
                if stored is not None and _is_expired(stored.state.model_dump(), now):
                    created = None
                body = self._body(op, created, now, batch.vectors.get(address))
                group.save(KIND, key, body, expected=stored.revision if stored else 0)
            try:
                await manager.commit(group)
            except RevisionConflictError:
                continue  # another writer was first: keep its created_at
            return

    def _body(
        self, op: PutOp, created: str | None, now: datetime, vectors: _Vectors | None
    ) -> JsonObject:
        body = item_body(self._codec, op.value or {}, vectors)
        body |= {"created_at": created or stamp(now), "updated_at": stamp(now)}
        if op.ttl is not None:
            body["ttl_minutes"] = op.ttl
            body["expires_at"] = stamp(now + timedelta(minutes=op.ttl))
        return body

    async def _refresh(self, manager: StatePersistenceManager, address: _Address) -> None:
        """Let an item that was read live on for its time."""
        key = document_key(address)
        stored = await manager.load_with_revision(KIND, key)
        body = stored.state.model_dump() if stored is not None else {}
        if stored is None or body.get("ttl_minutes") is None:
            return
        expires = manager.clock.now() + timedelta(minutes=body["ttl_minutes"])
        try:
            await manager.save(
                KIND, key, {**body, "expires_at": stamp(expires)}, expected=stored.revision
            )
        except RevisionConflictError:
            return  # it was put again, or read again, which refreshes it too

    async def _load(
        self, manager: StatePersistenceManager, address: _Address
    ) -> _StoredItem | None:
        stored = await manager.load_with_revision(KIND, document_key(address))
        if stored is None:
            return None
        return self._item(stored.key, stored.state.model_dump(), manager.clock.now())

    def _item(self, key: tuple[str, ...], body: JsonObject, now: datetime) -> _StoredItem | None:
        """The item in a document; None if it has expired."""
        if _is_expired(body, now):
            return None
        content: JsonObject = {name: body[name] for name in ("order", "typed") if name in body}
        if "typed" not in content:
            content["json"] = body["value"]
        value = self._codec.decode_element(orjson.dumps(content))
        vectors = body.get("vectors", {})
        return _StoredItem(key[:-1], from_segment(key[-1]), value, body, vectors)

    async def _items(
        self, manager: StatePersistenceManager, prefix: tuple[str, ...]
    ) -> list[_StoredItem]:
        now = manager.clock.now()
        found = []
        async for stored in manager.scan(KIND, prefix):
            item = self._item(stored.key, stored.state.model_dump(), now)
            if item is not None and len(stored.key) > 1:
                found.append(item)
        return found

    async def _search(
        self,
        manager: StatePersistenceManager,
        op: SearchOp,
        query: Sequence[float] | None,
    ) -> list[tuple[_StoredItem, float | None]]:
        """The newest first; with a query the most similar first, then those without a vector."""
        items = await self._items(manager, tuple(op.namespace_prefix))
        found = [item for item in items if _matches(item.value, op.filter)]
        found.sort(key=lambda item: (item.namespace, item.key))
        found.sort(key=lambda item: item.body["updated_at"], reverse=True)
        scored: list[tuple[_StoredItem, float | None]] = [(item, None) for item in found]
        if query is not None:
            scored = [(item, item.similarity(query)) for item in found]
            scored.sort(key=lambda each: -math.inf if each[1] is None else each[1], reverse=True)
        return scored[op.offset : op.offset + op.limit]

    async def _namespaces(
        self, manager: StatePersistenceManager, op: ListNamespacesOp
    ) -> list[tuple[str, ...]]:
        conditions = op.match_conditions or ()
        found = {
            item.namespace if op.max_depth is None else item.namespace[: op.max_depth]
            for item in await self._items(manager, ())
            if all(_fits(condition, item.namespace) for condition in conditions)
        }
        return sorted(found)[op.offset : op.offset + op.limit]

    async def _sweep(self, manager: StatePersistenceManager) -> int:
        now = manager.clock.now()
        removed = 0
        async for stored in manager.scan(KIND):
            if _is_expired(stored.state.model_dump(), now):
                try:
                    removed += await manager.delete(KIND, stored.key, expected=stored.revision)
                except RevisionConflictError:
                    continue  # it was put again
        return removed

    async def _sweep_in_time(self, manager: StatePersistenceManager) -> None:
        minutes = (self.ttl_config or {}).get("sweep_interval_minutes")
        now = manager.clock.now()
        if not minutes:
            return
        if self._swept is None:
            self._swept = now
        elif now - self._swept >= timedelta(minutes=minutes):
            self._swept = now
            await self._sweep(manager)

    # -- indexing --------------------------------------------------------------------------------

    def _texts_of(self, puts: Iterable[PutOp]) -> dict[str, list[tuple[_Address, str]]]:
        """The texts to embed, and for each the items and fields that have it."""
        texts: dict[str, list[tuple[_Address, str]]] = defaultdict(list)
        for op in puts:
            if op.value is None or op.index is False:
                continue
            fields = self._fields if op.index is None else [(p, _tokens(p)) for p in op.index]
            for path, tokens in fields:
                found = get_text_at_path(op.value, tokens)
                for number, text in enumerate(found):
                    name = path if len(found) == 1 else f"{path}.{number}"
                    texts[text].append(((op.namespace, op.key), name))
        return texts


@dataclass(slots=True)
class _Batch:
    """The operations of one batch; the last put of an address counts."""

    ops: list[Op]
    puts: dict[_Address, PutOp]
    queries: dict[str, Sequence[float]]
    """The vector of each query, once it is embedded."""
    vectors: dict[_Address, _Vectors] = field(default_factory=dict)

    @classmethod
    def of(cls, ops: Iterable[Op]) -> _Batch:
        """Raises ``InvalidNamespaceError`` for a namespace that no put allows."""
        listed = list(ops)
        puts: dict[_Address, PutOp] = {}
        queries: dict[str, Sequence[float]] = {}
        for op in listed:
            if not isinstance(op, GetOp | SearchOp | ListNamespacesOp | PutOp):
                raise ValueError(f"not an operation of a store: {op!r:.80}")  # noqa: TRY004  # as LangGraph's own
            validate_op_namespace(op)
            if isinstance(op, PutOp):
                puts[op.namespace, op.key] = op
            elif isinstance(op, SearchOp) and op.query:
                queries[op.query] = ()
        return cls(listed, puts, queries)


@dataclass(frozen=True, slots=True)
class _StoredItem:
    """An item that has not expired."""

    namespace: tuple[str, ...]
    key: str
    value: dict[str, Any]
    body: JsonObject
    vectors: _Vectors

    def item(self) -> Item:
        return Item(**self._fields())

    def search_item(self, score: float | None) -> SearchItem:
        return SearchItem(**self._fields(), score=score)

    def similarity(self, query: Sequence[float]) -> float | None:
        """The best of its fields; None for an item without a vector, or without a query's."""
        scores = [_cosine(query, vector) for vector in self.vectors.values()] if query else []
        return max(scores, default=None)

    def _fields(self) -> dict[str, Any]:
        return {
            "namespace": self.namespace,
            "key": self.key,
            "value": self.value,
            "created_at": instant(self.body["created_at"]),
            "updated_at": instant(self.body["updated_at"]),
        }


def _tokens(path: str) -> Any:
    return path if path == "$" else tokenize_path(path)


def _vectors_by_item(
    texts: Mapping[str, Sequence[tuple[_Address, str]]], vectors: Sequence[Sequence[float]]
) -> dict[_Address, _Vectors]:
    found: dict[_Address, dict[str, Sequence[float]]] = defaultdict(dict)
    for places, vector in zip(texts.values(), vectors, strict=True):
        for address, path in places:
            found[address][path] = vector
    return dict(found)


def item_body(codec: ValueCodec, value: Mapping[str, Any], vectors: _Vectors | None) -> JsonObject:
    """An item as it is stored, without its times."""
    body: JsonObject = orjson.loads(codec.element(dict(value)))
    body["value"] = body.pop("json", None)
    if vectors:
        body["vectors"] = {path: [*map(float, vector)] for path, vector in vectors.items()}
    return body


def document_key(address: _Address) -> tuple[str, ...]:
    """The key of an item's document."""
    namespace, key = address
    return (*namespace, as_segment(key))


def _is_expired(body: JsonObject, now: datetime) -> bool:
    expires = body.get("expires_at")
    return expires is not None and instant(expires) <= now


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


def _fits(condition: MatchCondition, namespace: tuple[str, ...]) -> bool:
    path = condition.path
    if len(namespace) < len(path):
        return False
    if condition.match_type == "prefix":
        labels: Sequence[str] = namespace[: len(path)]
    elif condition.match_type == "suffix":
        labels = namespace[len(namespace) - len(path) :]
    else:
        raise ValueError(f"not a kind of match: {condition.match_type!r}")
    return all(wanted in ("*", label) for wanted, label in zip(path, labels, strict=True))


def _matches(value: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> bool:
    return all(_agrees(value.get(name), each) for name, each in (wanted or {}).items())


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        if any(name.startswith("$") for name in wanted):
            return all(_compare(value, name, operand) for name, operand in wanted.items())
        if not isinstance(value, dict):
            return False
        return all(_agrees(value.get(name), each) for name, each in wanted.items())
    if isinstance(wanted, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(wanted):
            return False
        return all(_agrees(one, other) for one, other in zip(value, wanted, strict=True))
    return bool(value == wanted)


def _compare(value: Any, operator: str, operand: Any) -> bool:
    if operator == "$eq":
        return bool(value == operand)
    if operator == "$ne":
        return bool(value != operand)
    if operator not in ("$gt", "$gte", "$lt", "$lte"):
        raise ValueError(f"not an operator of a filter: {operator!r}")
    try:
        one, other = float(value), float(operand)
    except (TypeError, ValueError):
        return False  # what is missing or no number is neither more nor less
    return {
        "$gt": one > other,
        "$gte": one >= other,
        "$lt": one < other,
        "$lte": one <= other,
    }[operator]
