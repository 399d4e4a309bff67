"""The order of strategies that agree in keys and leaf, kept up to date as counts change. Knows submissions by slot; reserves
nothing.

The submissions with available chunks that agree in the values of all keys form a *bunch* with a tree of its own: by id, or by
priority and id, weighted by available chunks. The bunches that agree in the first key's value form a *group*. By its mode the
groups stand in a tree by chunks in flight for the value (PreferDistinct), by whether these are below a limit
(MaxSimultaneous), or in none because the pick names the group (SelectOnly); then by what the leaf says. With one key a group
has one bunch and a pick is O(log n); otherwise a pick compares the bunches of the groups that are tied in the first count, or
of the group that it names.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from opsqueue._speedups.bits cimport mixed, must, random_below
from opsqueue._speedups.slotmap cimport SlotMap, slotmap_add, slotmap_close, slotmap_open, slotmap_remove
from opsqueue._speedups.submission cimport Submission
from opsqueue._speedups.tree cimport (
    Nodes,
    node_give_back,
    nodes_close,
    nodes_open,
    tree_first,
    tree_insert,
    tree_last,
    tree_link,
    tree_next,
    tree_pick,
    tree_remove,
    tree_sum_through,
    tree_unlink,
    tree_weigh,
)
from opsqueue._speedups.values cimport Values


cdef enum:
    LEAF_OLDEST = 0
    LEAF_NEWEST = 1
    LEAF_RANDOM = 2
    LEAF_HIGHEST = 3
    LEAF_LOWEST = 4

cdef enum:
    MODE_COUNT = 0            # groups with the fewest chunks in flight first
    MODE_LIMIT = 1            # groups with fewer chunks in flight than the ranking's limit first
    MODE_SELECT = 2           # a pick names its group

cdef enum:
    NO_KEY = 0xFFFFFFFF       # a key that no submission has
    NO_PICK = 0xFFFFFFFF

cdef enum:
    MAX_DEPTH = 8             # keys of one strategy


cdef struct Group:            # of submissions with one value of the outermost key
    uint32_t value            # 0: without the key
    uint32_t node             # in the ranking's tree
    uint32_t first_bunch      # also links free ones


cdef struct Bunch:
    uint32_t values[8]        # of every key; 0: without
    uint32_t root             # of its submissions' tree
    uint32_t group
    uint32_t previous         # in its group
    uint32_t next             # also links free ones
    uint32_t hash


cdef struct PickBy:           # what a strategy asks of a ranking beside its order
    uint32_t select_count
    uint32_t selected[8]      # value groups of the first keys; 0 matches nobody
    uint64_t limits[8]        # by key: chunks in flight below which a value takes part; 0: no limit


cdef struct Ranking:
    # what it orders by
    uint32_t mode
    uint32_t depth
    uint32_t keys[8]
    uint32_t first_preferred  # keys from here on are compared by their counts
    uint32_t leaf
    uint32_t leaf_key
    uint64_t limit            # of MODE_LIMIT
    # groups
    Nodes nodes               # of the groups' tree and of all bunches' trees
    uint32_t root
    Group *groups
    uint32_t group_capacity
    uint32_t free_group
    uint32_t *group_of_value  # by value group's number; 0: none
    uint32_t value_capacity
    # bunches
    Bunch *bunches
    uint32_t bunch_capacity
    uint32_t free_bunch
    SlotMap by_values
    # by submission's slot
    uint32_t *leaf_of         # node in its bunch's tree; 0: no available chunk
    uint32_t *bunch_of
    uint32_t slot_capacity
    # while it is built: submissions in slots below are in
    uint32_t built
    bint ready


cdef inline void ranking_open(Ranking *r, uint64_t seed) noexcept nogil:
    memset(r, 0, sizeof(Ranking))
    nodes_open(&r.nodes, seed)
    slotmap_open(&r.by_values)


cdef inline void ranking_close(Ranking *r) noexcept nogil:
    nodes_close(&r.nodes)
    slotmap_close(&r.by_values)
    free(r.groups)
    free(r.group_of_value)
    free(r.bunches)
    free(r.leaf_of)
    free(r.bunch_of)
    memset(r, 0, sizeof(Ranking))


cdef inline uint32_t value_for(Values *values, Submission *s, uint32_t key) noexcept nogil:
    cdef uint32_t at
    for at in range(s.value_count):
        if values.at[s.values[at]].key == key:
            return s.values[at]
    return 0


cdef inline bint by_priority(Ranking *r) noexcept nogil:
    return r.leaf >= LEAF_HIGHEST


cdef inline uint64_t priority(Ranking *r, Values *values, Submission *s) noexcept nogil:
    """Smaller comes first; the largest number: no value."""
    cdef uint32_t group = value_for(values, s, r.leaf_key)
    cdef uint64_t rank
    if group == 0:
        return <uint64_t>-1
    rank = <uint64_t>values.at[group].value ^ (<uint64_t>1 << 63)
    if r.leaf == LEAF_HIGHEST:
        rank = ~rank
    return rank if rank < <uint64_t>-1 else rank - 1


cdef inline void hold_slot(Ranking *r, uint32_t slot) noexcept nogil:
    cdef uint32_t capacity = r.slot_capacity if r.slot_capacity else 64
    if slot < r.slot_capacity:
        return
    while capacity <= slot:
        capacity *= 2
    r.leaf_of = <uint32_t *>must(realloc(r.leaf_of, <size_t>capacity * sizeof(uint32_t)))
    r.bunch_of = <uint32_t *>must(realloc(r.bunch_of, <size_t>capacity * sizeof(uint32_t)))
    memset(r.leaf_of + r.slot_capacity, 0, <size_t>(capacity - r.slot_capacity) * sizeof(uint32_t))
    r.slot_capacity = capacity


cdef inline void hold_value(Ranking *r, uint32_t value) noexcept nogil:
    cdef uint32_t capacity = r.value_capacity if r.value_capacity else 64
    if value < r.value_capacity:
        return
    while capacity <= value:
        capacity *= 2
    r.group_of_value = <uint32_t *>must(realloc(r.group_of_value, <size_t>capacity * sizeof(uint32_t)))
    memset(r.group_of_value + r.value_capacity, 0, <size_t>(capacity - r.value_capacity) * sizeof(uint32_t))
    r.value_capacity = capacity


cdef inline uint32_t group_made(Ranking *r, uint32_t value) noexcept nogil:
    cdef uint32_t at, capacity
    hold_value(r, value)
    if r.group_of_value[value]:
        return r.group_of_value[value]
    if r.free_group == 0:
        capacity = r.group_capacity * 2 if r.group_capacity else 16
        r.groups = <Group *>must(realloc(r.groups, <size_t>capacity * sizeof(Group)))
        if r.group_capacity == 0:
            r.group_capacity = 1
        for at in range(r.group_capacity, capacity):
            r.groups[at].first_bunch = at + 1 if at + 1 < capacity else 0
        r.free_group = r.group_capacity
        r.group_capacity = capacity
    at = r.free_group
    r.free_group = r.groups[at].first_bunch
    r.groups[at].value = value
    r.groups[at].node = 0
    r.groups[at].first_bunch = 0
    r.group_of_value[value] = at
    return at


cdef inline uint32_t bunch_made(Ranking *r, Values *values, Submission *s) noexcept nogil:
    """The bunch of the submission's values, with its group; made if there is none."""
    cdef uint32_t wanted[8]
    cdef uint32_t at, level, capacity, hash, group
    cdef uint64_t entry, mix = 0
    cdef Bunch *bunch
    for level in range(r.depth):
        wanted[level] = value_for(values, s, r.keys[level])
        mix = mixed(mix + wanted[level] + 1)
    hash = <uint32_t>(mix >> 32)
    at = hash & r.by_values.mask
    entry = r.by_values.entries[at]
    while entry:
        if <uint32_t>(entry >> 32) == hash:
            bunch = &r.bunches[<uint32_t>entry - 1]
            for level in range(r.depth):
                if bunch.values[level] != wanted[level]:
                    break
            else:
                return <uint32_t>entry - 1
        at = (at + 1) & r.by_values.mask
        entry = r.by_values.entries[at]
    if r.free_bunch == 0:
        capacity = r.bunch_capacity * 2 if r.bunch_capacity else 16
        r.bunches = <Bunch *>must(realloc(r.bunches, <size_t>capacity * sizeof(Bunch)))
        if r.bunch_capacity == 0:
            r.bunch_capacity = 1
        for at in range(r.bunch_capacity, capacity):
            r.bunches[at].next = at + 1 if at + 1 < capacity else 0
        r.free_bunch = r.bunch_capacity
        r.bunch_capacity = capacity
    at = r.free_bunch
    bunch = &r.bunches[at]
    r.free_bunch = bunch.next
    for level in range(r.depth):
        bunch.values[level] = wanted[level]
    bunch.root = 0
    bunch.hash = hash
    group = group_made(r, wanted[0])
    bunch.group = group
    bunch.previous = 0
    bunch.next = r.groups[group].first_bunch
    if bunch.next:
        r.bunches[bunch.next].previous = at
    r.groups[group].first_bunch = at
    slotmap_add(&r.by_values, hash, at)
    return at


cdef inline void bunch_dropped(Ranking *r, uint32_t at) noexcept nogil:
    """Its last submission has gone; its group goes with its last bunch."""
    cdef Bunch *bunch = &r.bunches[at]
    cdef Group *group = &r.groups[bunch.group]
    cdef uint32_t number = bunch.group
    slotmap_remove(&r.by_values, bunch.hash, at)
    if bunch.previous:
        r.bunches[bunch.previous].next = bunch.next
    else:
        group.first_bunch = bunch.next
    if bunch.next:
        r.bunches[bunch.next].previous = bunch.previous
    bunch.next = r.free_bunch
    r.free_bunch = at
    if group.first_bunch == 0:
        if group.node:
            tree_remove(&r.nodes, &r.root, group.node)
        r.group_of_value[group.value] = 0
        group.first_bunch = r.free_group
        r.free_group = number


cdef inline void group_rank(Ranking *r, Values *values, uint32_t number) noexcept nogil:
    """Put a group where its count and its best submission say."""
    cdef Group *group = &r.groups[number]
    cdef uint64_t hi = values.at[group.value].in_flight
    cdef uint64_t lo = number
    cdef uint64_t weight = 1
    cdef uint64_t rank
    cdef uint32_t root
    if r.mode == MODE_SELECT:
        return
    if r.mode == MODE_LIMIT:
        hi = group.value != 0 and hi >= r.limit
    if r.depth == 1:
        root = r.bunches[group.first_bunch].root
        weight = r.nodes.at[root].sum
        if by_priority(r):
            if r.mode == MODE_LIMIT:
                # 1 + 64 + 63 bits: whether it is at its limit, priority, id
                rank = r.nodes.at[tree_first(&r.nodes, root)].hi
                hi = hi << 63 | rank >> 1
                lo = rank << 63 | r.nodes.at[tree_first(&r.nodes, root)].lo
        elif r.leaf == LEAF_OLDEST:
            lo = r.nodes.at[tree_first(&r.nodes, root)].hi
        elif r.leaf == LEAF_NEWEST:
            lo = ~r.nodes.at[tree_last(&r.nodes, root)].hi
        else:
            lo = number
    if group.node == 0:
        group.node = tree_insert(&r.nodes, &r.root, hi, lo, weight, number)
    elif r.nodes.at[group.node].hi == hi and r.nodes.at[group.node].lo == lo:
        tree_weigh(&r.nodes, group.node, weight)
    else:
        tree_unlink(&r.nodes, &r.root, group.node)
        tree_link(&r.nodes, &r.root, group.node, hi, lo, weight)


cdef inline void ranking_sync(Ranking *r, Values *values, Submission *s, uint64_t available) noexcept nogil:
    """The submission has so many chunks to hand out, and its values' counts may have changed."""
    cdef uint32_t leaf, bunch, value
    cdef uint64_t hi = s.id, lo = 0
    if r.ready or s.slot < r.built:
        hold_slot(r, s.slot)
        leaf = r.leaf_of[s.slot]
        if available:
            if leaf == 0:
                bunch = bunch_made(r, values, s)
                r.bunch_of[s.slot] = bunch
                if by_priority(r):
                    hi = priority(r, values, s)
                    lo = s.id
                r.leaf_of[s.slot] = tree_insert(&r.nodes, &r.bunches[bunch].root, hi, lo, available, s.slot)
            else:
                tree_weigh(&r.nodes, leaf, available)
        elif leaf:
            bunch = r.bunch_of[s.slot]
            tree_remove(&r.nodes, &r.bunches[bunch].root, leaf)
            r.leaf_of[s.slot] = 0
            if r.bunches[bunch].root == 0:
                bunch_dropped(r, bunch)
    value = value_for(values, s, r.keys[0])
    if value < r.value_capacity and r.group_of_value[value]:
        group_rank(r, values, r.group_of_value[value])


cdef inline uint32_t bunch_pick(Ranking *r, uint32_t bunch, uint64_t *random) noexcept nogil:
    cdef uint32_t root = r.bunches[bunch].root
    if r.leaf == LEAF_OLDEST or by_priority(r):
        return r.nodes.at[tree_first(&r.nodes, root)].payload
    if r.leaf == LEAF_NEWEST:
        return r.nodes.at[tree_last(&r.nodes, root)].payload
    return r.nodes.at[tree_pick(&r.nodes, root, random_below(random, r.nodes.at[root].sum))].payload


cdef inline int bunch_compare(Ranking *r, Values *values, uint32_t a, uint32_t b) noexcept nogil:
    """Of two bunches of tied groups: negative when a comes first, 0 when they are tied (Random only)."""
    cdef uint32_t level
    cdef uint64_t of_a, of_b
    for level in range(r.first_preferred if r.mode == MODE_SELECT else 1, r.depth):
        of_a = values.at[r.bunches[a].values[level]].in_flight
        of_b = values.at[r.bunches[b].values[level]].in_flight
        if of_a != of_b:
            return -1 if of_a < of_b else 1
    if r.leaf == LEAF_RANDOM:
        return 0
    if r.leaf != LEAF_NEWEST:
        a = tree_first(&r.nodes, r.bunches[a].root)
        b = tree_first(&r.nodes, r.bunches[b].root)
        if by_priority(r) and r.nodes.at[a].hi == r.nodes.at[b].hi:
            return -1 if r.nodes.at[a].lo < r.nodes.at[b].lo else 1
        of_a = r.nodes.at[a].hi
        of_b = r.nodes.at[b].hi
    else:
        of_a = ~r.nodes.at[tree_last(&r.nodes, r.bunches[a].root)].hi
        of_b = ~r.nodes.at[tree_last(&r.nodes, r.bunches[b].root)].hi
    return -1 if of_a < of_b else 1


cdef inline bint takes_part(Ranking *r, Values *values, const PickBy *by, uint32_t bunch) noexcept nogil:
    """The bunch has the selected values, and none at its limit."""
    cdef uint32_t level, value
    for level in range(r.depth):
        value = r.bunches[bunch].values[level]
        if level < by.select_count:
            if value == 0 or value != by.selected[level]:  # a value that nobody has is 0 as well
                return False
        elif by.limits[level] and value and values.at[value].in_flight >= by.limits[level]:
            return False
    return True


cdef struct Choice:
    uint32_t bunch
    uint64_t total            # weight of the bunches that are tied with it, its own included


cdef inline void choose(Ranking *r, Values *values, const PickBy *by, uint32_t group, Choice *choice,
                        uint64_t *random) noexcept nogil:
    """Compare the choice with each bunch of a group."""
    cdef uint32_t bunch = r.groups[group].first_bunch
    cdef uint64_t weight
    cdef int order
    while bunch:
        if takes_part(r, values, by, bunch):
            weight = r.nodes.at[r.bunches[bunch].root].sum
            order = -1 if choice.bunch == 0 else bunch_compare(r, values, bunch, choice.bunch)
            if order < 0:
                choice.bunch = bunch
                choice.total = weight
            elif order == 0:
                # a weighted draw in one pass: each tied bunch replaces the choice with its share of what was seen so far
                choice.total += weight
                if random_below(random, choice.total) < weight:
                    choice.bunch = bunch
        bunch = r.bunches[bunch].next


cdef inline uint32_t ranking_pick(Ranking *r, Values *values, const PickBy *by, uint64_t *random) noexcept nogil:
    """The slot of the submission that comes first; NO_PICK: none takes part."""
    cdef uint32_t node, value
    cdef uint64_t first
    cdef Choice choice = Choice(0, 0)
    if r.mode == MODE_SELECT:
        value = by.selected[0]
        if value == 0 or value >= r.value_capacity or r.group_of_value[value] == 0:
            return NO_PICK
        choose(r, values, by, r.group_of_value[value], &choice, random)
        return NO_PICK if choice.bunch == 0 else bunch_pick(r, choice.bunch, random)
    node = tree_first(&r.nodes, r.root)
    if node == 0:
        return NO_PICK
    first = r.nodes.at[node].hi
    if r.mode == MODE_LIMIT:
        if (first >> 63 if by_priority(r) else first):
            return NO_PICK
    elif by.limits[0] and first >= by.limits[0] and r.groups[r.nodes.at[node].payload].value:
        return NO_PICK
    if r.depth == 1 and (r.mode == MODE_LIMIT or not by_priority(r)):
        if r.leaf == LEAF_RANDOM:
            node = tree_pick(&r.nodes, r.root, random_below(random, tree_sum_through(&r.nodes, r.root, first)))
        return bunch_pick(r, r.groups[r.nodes.at[node].payload].first_bunch, random)
    while node and r.nodes.at[node].hi == first:
        choose(r, values, by, r.nodes.at[node].payload, &choice, random)
        node = tree_next(&r.nodes, node)
    return NO_PICK if choice.bunch == 0 else bunch_pick(r, choice.bunch, random)
