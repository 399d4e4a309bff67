# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Which submission comes next, for every strategy: the plain order, the indexes, and who asked for them. Reserves nothing.

Oldest, Newest and Random read one tree of all submissions with available chunks. Every other strategy is a list of plans
(opsqueue.server.plans), each answered by an index (ranking.pxd) that all strategies with the same keys and leaf share, whatever
values and limits they name. An index is built at its first use, in slices, and dropped when it is the longest unused and
another is wanted.
"""

from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memset

from opsqueue._speedups.bits cimport clock_ns, mixed, must, random_below
from opsqueue._speedups.ranking cimport (
    LEAF_HIGHEST, LEAF_LOWEST, LEAF_NEWEST, LEAF_OLDEST, LEAF_RANDOM, MODE_COUNT, MODE_LIMIT, MODE_SELECT, NO_KEY, NO_PICK,
    Ranking, ranking_close, ranking_open, ranking_pick, ranking_sync,
)
from opsqueue._speedups.tree cimport (
    nodes_close, nodes_open, tree_first, tree_insert, tree_last, tree_pick, tree_remove, tree_weigh,
)
from opsqueue._speedups.values cimport value_drop, value_find, value_take, values_close, values_open

from opsqueue.protocol.errors import StrategyError
from opsqueue.protocol.strategy import from_canonical
from opsqueue.server.plans import plans

cdef enum:
    OLDEST = 0                    # handles of the plain strategies, and their leaves
    NEWEST = 1
    RANDOM = 2
    FIRST_RANKED = 3
    NO_SHAPE = 0xFFFFFFFF
    MAX_RANKINGS = 64             # indexes kept; clients choose the keys
    KEPT_MS = 1000                # an index lives at least this long after it was used
    MAX_STRATEGIES = 65536        # different ones at a time
    MAX_SHAPES = 131072           # different indexes that strategies name, at a time
    STARVED_MS = 50               # until a request whose index cannot be built now is looked at again
    MAX_FALLEN = 1024             # (key, count) pairs listed; beyond, whoever a limit holds back is woken
    BUILD_AT_ONCE = 20000         # submissions; an index over more is built in slices
    CLOCK_EVERY = 128             # steps of a sliced job between two looks at the clock
    MAX_WOKEN = 1024              # (key, value) pairs listed; beyond, everybody is woken

cdef uint64_t NEVER = ~<uint64_t>0

_LEAVES = {"O": LEAF_OLDEST, "N": LEAF_NEWEST, "R": LEAF_RANDOM, "H": LEAF_HIGHEST, "L": LEAF_LOWEST}


cdef class Orders:
    """`random` makes Random repeatable. The engine keeps `submissions` and what goes with it up to date."""

    def __cinit__(self, uint64_t random):
        self.random = random
        nodes_open(&self.plain, mixed(random + 1))
        values_open(&self.values)
        self.woken = []
        self.fallen = []
        self.waking = []
        self.starving = []
        self.key_numbers = {}
        self.key_records = []
        self.free_keys = []
        self.strategy_capacity = 16
        self.strategies = <Strategy *>must(calloc(self.strategy_capacity, sizeof(Strategy)))
        self.strategy_count = FIRST_RANKED
        self.canonicals = [b"O", b"N", b"R"]
        self.handles = {b"O": OLDEST, b"N": NEWEST, b"R": RANDOM}
        self.free_handles = []
        self.refusal = ""
        self.shape_keys = []
        self.free_shapes = []
        self.shape_numbers = {}

    def __dealloc__(self):
        cdef uint32_t at
        for at in range(self.ranking_count):
            ranking_close(self.shapes[self.live[at]].ranking)
            free(self.shapes[self.live[at]].ranking)
        for at in range(self.strategy_count):
            free(self.strategies[at].plans)
        free(self.strategies)
        free(self.shapes)
        nodes_close(&self.plain)
        values_close(&self.values)

    # --- submissions ---

    cdef void enter(self, Submission *s, dict metadata) except *:
        """Note its values; `sync` puts it in order."""
        cdef uint32_t number
        cdef int64_t value
        cdef bint is_new = False
        if not metadata:
            return
        s.values = <uint32_t *>must(malloc(len(metadata) * sizeof(uint32_t)))
        for key, amount in metadata.items():
            number = self.key_number(key)
            value = amount
            s.values[s.value_count] = value_take(&self.values, number, value, &is_new)
            if not is_new:
                self.key_dropped(number)
            s.value_count += 1

    cdef void leave(self, Submission *s) noexcept:
        cdef uint32_t at, key
        for at in range(s.value_count):
            key = self.values.at[s.values[at]].key
            if value_drop(&self.values, s.values[at]):
                self.key_dropped(key)
        free(s.values)
        s.values = NULL
        s.value_count = 0

    cdef void sync(self, Submission *s, uint64_t available) noexcept:
        """It has so many chunks to hand out, and its values' counts may have changed: every index takes note."""
        cdef uint32_t at
        if available != s.indexed:
            if available > s.indexed:
                self.epoch += 1
                if self.selecting:
                    for at in range(s.value_count):
                        if len(self.woken) >= MAX_WOKEN:
                            self.all_woken = True
                            break
                        self.woken.append(
                            (self.key_records[self.values.at[s.values[at]].key][0], self.values.at[s.values[at]].value)
                        )
            self.available += available - s.indexed
            s.indexed = available
            if available == 0:
                tree_remove(&self.plain, &self.plain_root, s.node)
                s.node = 0
            elif s.node:
                tree_weigh(&self.plain, s.node, available)
            else:
                s.node = tree_insert(&self.plain, &self.plain_root, s.id, 0, available, s.slot)
        for at in range(self.ranking_count):
            ranking_sync(self.shapes[self.live[at]].ranking, &self.values, s, available)

    cdef void in_flight(self, Submission *s, int change) noexcept:
        """So many more of its chunks are held; `sync` must follow."""
        cdef uint32_t at
        cdef uint64_t before
        for at in range(s.value_count):
            before = self.values.at[s.values[at]].in_flight
            self.values.at[s.values[at]].in_flight += <uint64_t><int64_t>change
            if change < 0 and self.limits_waited:
                if change < -1 or len(self.fallen) >= MAX_FALLEN:
                    self.all_fallen = True
                else:
                    self.fallen.append((self.key_records[self.values.at[s.values[at]].key][0], before))

    # --- names of keys ---

    cdef uint32_t key_number(self, str key):
        """A metadata key's number, with one more reference."""
        cdef list record
        number = self.key_numbers.get(key)
        if number is None:
            if self.free_keys:
                number = self.free_keys.pop()
                self.key_records[number] = [key, 0]
            else:
                number = len(self.key_records)
                self.key_records.append([key, 0])
            self.key_numbers[key] = number
        record = self.key_records[number]
        record[1] += 1
        return number

    cdef void key_dropped(self, uint32_t key) noexcept:
        """One reference less; a key without any is forgotten, as clients choose the names."""
        cdef list record
        if key == NO_KEY:
            return
        record = self.key_records[key]
        record[1] -= 1
        if record[1] == 0:
            del self.key_numbers[record[0]]
            self.key_records[key] = None
            self.free_keys.append(key)

    # --- strategies ---

    cdef int strategy(self, const uint8_t *canonical, uint32_t size) noexcept:
        """The handle of a strategy; -1: `refusal` says why there is none."""
        cdef bytes wanted
        cdef object last
        if size == 1:
            if canonical[0] == c"O":
                return OLDEST
            if canonical[0] == c"N":
                return NEWEST
            if canonical[0] == c"R":
                return RANDOM
        last = self.canonicals[self.last_strategy]
        if last is not None and <uint32_t>len(<bytes>last) == size:
            if memcmp(<const char *><bytes>last, canonical, size) == 0:
                return self.last_strategy
        wanted = canonical[:size]
        handle = self.handles.get(wanted)
        if handle is None:
            try:
                handle = self.new_strategy(wanted)
            except StrategyError as error:
                self.refusal = str(error)
                return -1
            if handle < 0:
                return -1
        self.last_strategy = handle
        return handle

    cdef int new_strategy(self, bytes canonical) except -2:
        cdef uint32_t capacity, at
        cdef int handle
        cdef Strategy *made
        wanted = plans(from_canonical(canonical))
        if self.strategy_count == MAX_STRATEGIES and not self.free_handles and not self.recycle():
            self.refusal = f"consumers wait with {MAX_STRATEGIES} different strategies already; try again later"
            return -1
        if self.free_handles:
            handle = self.free_handles.pop()
        else:
            if self.strategy_count == self.strategy_capacity:
                capacity = self.strategy_capacity * 2
                self.strategies = <Strategy *>must(realloc(self.strategies, capacity * sizeof(Strategy)))
                memset(self.strategies + self.strategy_capacity, 0, self.strategy_capacity * sizeof(Strategy))
                self.strategy_capacity = capacity
            handle = <int>self.strategy_count
            self.strategy_count += 1
            self.canonicals.append(None)
        made = &self.strategies[handle]
        made.plans = <Plan *>must(calloc(len(wanted), sizeof(Plan)))
        made.plan_count = <uint32_t>len(wanted)
        for at in range(made.plan_count):
            made.plans[at].shape = NO_SHAPE
        made.holds = 0
        self.canonicals[handle] = canonical
        self.handles[canonical] = handle
        try:
            for at in range(made.plan_count):
                self.fill(&made.plans[at], wanted[at])
        except StrategyError:
            self.forget(handle)
            raise
        self.selecting += self.selects(made)
        made.counted = True
        return handle

    cdef bint selects(self, Strategy *asked) noexcept:
        """It has SelectOnly in every alternative."""
        cdef uint32_t at
        for at in range(asked.plan_count):
            if asked.plans[at].by.select_count == 0:
                return False
        return True

    cdef int fill(self, Plan *plan, object wanted) except -1:
        """Of `wanted`, a plan of opsqueue.server.plans."""
        cdef uint32_t at
        cdef int mode = MODE_COUNT
        cdef uint64_t limit = 0
        plan.leaf = _LEAVES[wanted.leaf]
        plan.shape = NO_SHAPE
        if not wanted.selects and not wanted.limits and not wanted.prefers and wanted.leaf_key is None:
            return 0
        names = [key for key, _ in wanted.selects]
        plan.by.select_count = <uint32_t>len(names)
        if wanted.selects:
            mode = MODE_SELECT
            for at in range(plan.by.select_count):
                plan.select_keys[at] = self.key_number(names[at])
                plan.select_values[at] = wanted.selects[at][1]
            for key, most in wanted.limits:
                plan.by.limits[len(names)] = most
                names.append(key)
        elif wanted.limits:
            limit = wanted.limits[0][1]
            if wanted.prefers:
                plan.by.limits[0] = limit  # of the key that is preferred first: the fewest are looked at first anyway
                limit = 0
            else:
                mode = MODE_LIMIT
                names.append(wanted.limits[0][0])
        first_preferred = len(names)
        names += wanted.prefers
        plan.shape = self.shape_for((mode, tuple(names), first_preferred, plan.leaf, wanted.leaf_key, limit))
        self.shapes[plan.shape].plans += 1
        return 0

    cdef int shape_for(self, tuple key) except -1:
        cdef uint32_t capacity
        number = self.shape_numbers.get(key)
        if number is not None:
            return number
        if self.free_shapes:
            number = self.free_shapes.pop()
            self.shape_keys[number] = key
            self.shape_numbers[key] = number
            return number
        if len(self.shape_keys) == MAX_SHAPES:
            raise StrategyError(f"consumers wait with {MAX_SHAPES} different indexes already; try again later")
        if <uint32_t>len(self.shape_keys) == self.shape_capacity:
            capacity = self.shape_capacity * 2 if self.shape_capacity else 16
            self.shapes = <Shape *>must(realloc(self.shapes, capacity * sizeof(Shape)))
            memset(self.shapes + self.shape_capacity, 0, (capacity - self.shape_capacity) * sizeof(Shape))
            self.shape_capacity = capacity
        number = len(self.shape_keys)
        self.shape_keys.append(key)
        self.shape_numbers[key] = number
        return number

    cdef void shape_dropped(self, uint32_t shape):
        """Forget a shape that no strategy names and that has no index, as clients choose them."""
        if self.shapes[shape].plans == 0 and self.shapes[shape].ranking == NULL:
            del self.shape_numbers[self.shape_keys[shape]]
            self.shape_keys[shape] = None
            self.free_shapes.append(shape)

    cdef bint recycle(self):
        """Forget the strategies that nobody waits with; False: there is none."""
        cdef int handle
        for handle in range(FIRST_RANKED, <int>self.strategy_count):
            if self.strategies[handle].holds == 0:
                self.forget(handle)
        return bool(self.free_handles)

    cdef void forget(self, int handle):
        cdef Strategy *old = &self.strategies[handle]
        cdef uint32_t at, level
        if old.counted:
            self.selecting -= self.selects(old)
        old.counted = False
        if old.starving:
            self.starving.remove(handle)
            old.starving = False
        for at in range(old.plan_count):
            if old.plans[at].shape != NO_SHAPE:
                self.shapes[old.plans[at].shape].plans -= 1
                self.shape_dropped(old.plans[at].shape)
            for level in range(old.plans[at].by.select_count):
                self.key_dropped(old.plans[at].select_keys[level])
        free(old.plans)
        old.plans = NULL
        old.plan_count = 0
        del self.handles[self.canonicals[handle]]
        self.canonicals[handle] = None
        self.free_handles.append(handle)

    cdef void hold(self, int strategy, int change) noexcept:
        """So many more parked requests name it."""
        self.strategies[strategy].holds += <uint32_t>change

    cdef list selections(self, int strategy):
        """The (key, value) of which a submission must have one for the strategy to take it; None: any may concern it."""
        cdef Strategy *asked = &self.strategies[strategy]
        cdef uint32_t at
        cdef list found = []
        if strategy < FIRST_RANKED:
            return None
        for at in range(asked.plan_count):
            if asked.plans[at].by.select_count == 0:
                return None
            pair = (self.key_records[asked.plans[at].select_keys[0]][0], asked.plans[at].select_values[0])
            if pair not in found:  # alternatives may select the same
                found.append(pair)
        return found

    cdef list limits(self, int strategy):
        """Every (key, limit) that may hold it back: a value of the key comes free when its held chunks go down from there."""
        cdef Strategy *asked = &self.strategies[strategy]
        cdef Plan *plan
        cdef uint32_t at, level
        cdef list found = []
        for at in range(asked.plan_count):
            plan = &asked.plans[at]
            if plan.shape == NO_SHAPE:
                continue
            mode, names, _, _, _, most = self.shape_keys[plan.shape]
            if mode == MODE_LIMIT:
                found.append((names[0], most))
            for level in range(8):
                if plan.by.limits[level]:
                    found.append((names[level], plan.by.limits[level]))
        return list(dict.fromkeys(found))

    cdef void wake_users(self, uint32_t shape) noexcept:
        """An index is complete: whoever waits for it may be served. Nobody else, who might want it dropped for his own."""
        cdef uint32_t handle, at
        for handle in range(FIRST_RANKED, self.strategy_count):
            if self.strategies[handle].holds:
                for at in range(self.strategies[handle].plan_count):
                    if self.strategies[handle].plans[at].shape == shape:
                        self.waking.append(handle)
                        break

    cdef bint take_woken(self, list found):
        """Add to `found` the (key, value) pairs that have got more chunks since the last call; True: perhaps all have."""
        cdef bint everything = self.all_woken
        if not everything:
            found.extend(self.woken)
        self.woken.clear()
        self.all_woken = False
        return everything

    cdef bint take_fallen(self, list found):
        """Add to `found` the (key, count) from which some value's held chunks have gone down; True: perhaps from all."""
        cdef bint everything = self.all_fallen
        if not everything:
            found.extend(self.fallen)
        self.fallen.clear()
        self.all_fallen = False
        return everything

    cdef list take_waking(self):
        """The strategies whose index is complete, and those whose index could not be built when it is time to try again."""
        cdef list found = self.waking
        self.waking = []
        if self.starving and self.now_ms >= self.starving_until_ms:
            found += self.starving
            self.starving = []
            for strategy in found:
                self.strategies[<int>strategy].starving = False
        return found

    # --- indexes ---

    cdef bint ready(self, int strategy) noexcept:
        """False: an index that it needs is being built, or cannot be built now."""
        cdef Ranking *ranking
        cdef uint32_t at
        if strategy < FIRST_RANKED:
            return True
        for at in range(self.strategies[strategy].plan_count):
            if self.strategies[strategy].plans[at].shape == NO_SHAPE:
                continue
            ranking = self.ranking_for(strategy, self.strategies[strategy].plans[at].shape, True)
            if ranking == NULL or not ranking.ready:
                return False
        return True

    cdef Ranking *ranking_for(self, int strategy, uint32_t shape, bint asked):
        """The index of a shape; its building has begun, at least. NULL: as many are in use as may be.

        `asked`: by a request that has just come, not by one that is looked at again; the index is in use.
        """
        cdef Shape *entry = &self.shapes[shape]
        cdef uint32_t at
        cdef uint32_t idle = MAX_RANKINGS
        cdef Ranking *made
        if asked:
            entry.used_ms = self.now_ms
        if entry.ranking != NULL:
            return entry.ranking
        if self.ranking_count == MAX_RANKINGS:
            for at in range(self.ranking_count):
                if self.shapes[self.live[at]].ranking.ready and (
                    idle == MAX_RANKINGS or self.shapes[self.live[at]].used_ms < self.shapes[self.live[idle]].used_ms
                ):
                    idle = at
            # One that is dropped while others wait for it would be built again at once, and nobody would be served.
            if idle == MAX_RANKINGS or self.now_ms < self.shapes[self.live[idle]].used_ms + KEPT_MS:
                if not self.strategies[strategy].starving:
                    if not self.starving:
                        self.starving_until_ms = self.now_ms + STARVED_MS
                    self.starving.append(strategy)
                    self.strategies[strategy].starving = True
                return NULL
            self.drop_ranking(idle)
        entry.used_ms = self.now_ms
        made = entry.ranking = <Ranking *>must(calloc(1, sizeof(Ranking)))
        ranking_open(made, mixed(self.random + <uint64_t>shape + FIRST_RANKED))
        mode, names, first_preferred, leaf, leaf_key, limit = self.shape_keys[shape]
        made.mode = mode
        made.first_preferred = first_preferred
        made.leaf = leaf
        made.limit = limit
        for name in names:
            made.keys[made.depth] = self.key_number(name)
            made.depth += 1
        if made.depth == 0:
            made.keys[0] = NO_KEY
            made.depth = 1
        made.leaf_key = NO_KEY if leaf_key is None else self.key_number(leaf_key)
        self.live[self.ranking_count] = shape
        self.ranking_count += 1
        self.building += 1
        if self.submission_count < BUILD_AT_ONCE:
            self.build(NEVER)
        return made

    cdef void drop_ranking(self, uint32_t at) noexcept:
        cdef uint32_t shape = self.live[at]
        cdef Ranking *ranking = self.shapes[shape].ranking
        cdef uint32_t level
        for level in range(ranking.depth):
            self.key_dropped(ranking.keys[level])
        self.key_dropped(ranking.leaf_key)
        if not ranking.ready:
            self.building -= 1
        ranking_close(ranking)
        free(ranking)
        self.shapes[shape].ranking = NULL
        self.ranking_count -= 1
        self.live[at] = self.live[self.ranking_count]
        self.shape_dropped(shape)

    cdef bint build(self, uint64_t until_ns) noexcept:
        """Go on with the indexes that are being built; True: there is more to do."""
        cdef uint32_t at
        cdef uint32_t steps = 0
        cdef Ranking *ranking
        cdef Submission *s
        for at in range(self.ranking_count):
            ranking = self.shapes[self.live[at]].ranking
            if ranking.ready:
                continue
            while ranking.built < self.submissions_end:
                s = self.submissions[ranking.built]
                ranking.built += 1
                if not <size_t>s & 1 and s.indexed:
                    ranking_sync(ranking, &self.values, s, s.indexed)
                steps += 1
                if steps % CLOCK_EVERY == 0 and until_ns != NEVER and clock_ns() >= until_ns:
                    return True
            ranking.ready = True
            self.building -= 1
            self.wake_users(self.live[at])
        return False

    cdef Submission *pick(self, int strategy, uint32_t *leaf, bint *whole) noexcept:
        """Whose chunk is next, and in which order its chunks go; NULL: nobody's.

        `whole`: the same strategy picks the same submission until it has no more.
        """
        cdef Strategy *asked
        cdef Plan *plan
        cdef Ranking *ranking
        cdef uint32_t at, level, slot
        cdef uint32_t plain = <uint32_t>strategy
        whole[0] = strategy < RANDOM
        if strategy >= FIRST_RANKED:
            asked = &self.strategies[strategy]
            for at in range(asked.plan_count):
                plan = &asked.plans[at]
                leaf[0] = plan.leaf
                if plan.shape == NO_SHAPE:
                    if self.available == 0:
                        continue
                    plain = plan.leaf
                    break
                ranking = self.ranking_for(strategy, plan.shape, False)
                if ranking == NULL or not ranking.ready:
                    return NULL
                for level in range(plan.by.select_count):
                    plan.by.selected[level] = value_find(&self.values, plan.select_keys[level], plan.select_values[level])
                slot = ranking_pick(ranking, &self.values, &plan.by, &self.random)
                if slot != NO_PICK:
                    self.shapes[plan.shape].used_ms = self.now_ms
                    return self.submissions[slot]
            else:
                return NULL
        leaf[0] = plain
        if self.plain_root == 0:
            return NULL
        if plain == OLDEST:
            slot = self.plain.at[tree_first(&self.plain, self.plain_root)].payload
        elif plain == NEWEST:
            slot = self.plain.at[tree_last(&self.plain, self.plain_root)].payload
        else:
            slot = self.plain.at[
                tree_pick(&self.plain, self.plain_root, random_below(&self.random, self.plain.at[self.plain_root].sum))
            ].payload
        return self.submissions[slot]
