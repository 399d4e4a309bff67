"""An ordered tree of (hi, lo) keys with a weight per node and the sum of weights per subtree. Knows not what it orders.

A treap (Seidel, Aragon 1996): expected depth O(log n) whatever the order of insertion. Nodes live in a slab and refer to
each other by index, so the slab can move when it grows, and a whole index is freed at once with its slab. Node 0 is "none".
A tree is its root's index, owned by the caller; trees of one slab may be many.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from opsqueue._speedups.bits cimport must, next_random


cdef struct Node:
    # the key; equal keys may not be in one tree
    uint64_t hi
    uint64_t lo
    # what a weighted pick goes by
    uint64_t weight
    uint64_t sum              # of the subtree
    # links
    uint32_t left
    uint32_t right
    uint32_t parent
    uint32_t priority         # larger ones are nearer to the root
    uint32_t payload          # the caller's


cdef struct Nodes:
    Node *at
    uint32_t capacity
    uint32_t free             # linked by `left`
    uint32_t used
    uint64_t random


cdef inline void nodes_open(Nodes *nodes, uint64_t seed) noexcept nogil:
    memset(nodes, 0, sizeof(Nodes))
    nodes.random = seed


cdef inline void nodes_close(Nodes *nodes) noexcept nogil:
    free(nodes.at)
    memset(nodes, 0, sizeof(Nodes))


cdef inline uint32_t node_take(Nodes *nodes) noexcept nogil:
    cdef uint32_t at, capacity
    if nodes.free == 0:
        capacity = nodes.capacity * 2 if nodes.capacity else 16
        nodes.at = <Node *>must(realloc(nodes.at, <size_t>capacity * sizeof(Node)))
        if nodes.capacity == 0:
            memset(nodes.at, 0, sizeof(Node))
            nodes.capacity = 1
        for at in range(nodes.capacity, capacity):
            nodes.at[at].left = at + 1 if at + 1 < capacity else 0
        nodes.free = nodes.capacity
        nodes.capacity = capacity
    at = nodes.free
    nodes.free = nodes.at[at].left
    nodes.used += 1
    return at


cdef inline void node_give_back(Nodes *nodes, uint32_t node) noexcept nogil:
    nodes.at[node].left = nodes.free
    nodes.free = node
    nodes.used -= 1


cdef inline bint key_less(Node *n, uint64_t hi, uint64_t lo) noexcept nogil:
    """(hi, lo) lies before the node's key."""
    return hi < n.hi or (hi == n.hi and lo < n.lo)


cdef inline void replace_child(Nodes *nodes, uint32_t *root, uint32_t parent, uint32_t child, uint32_t by) noexcept nogil:
    if parent == 0:
        root[0] = by
    elif nodes.at[parent].left == child:
        nodes.at[parent].left = by
    else:
        nodes.at[parent].right = by
    if by:
        nodes.at[by].parent = parent


cdef inline void rotate_up(Nodes *nodes, uint32_t *root, uint32_t node) noexcept nogil:
    """The node takes its parent's place, the parent becomes its child."""
    cdef Node *n = nodes.at
    cdef uint32_t parent = n[node].parent
    cdef uint32_t middle
    replace_child(nodes, root, n[parent].parent, parent, node)
    if n[parent].left == node:
        middle = n[node].right
        n[node].right = parent
        n[parent].left = middle
    else:
        middle = n[node].left
        n[node].left = parent
        n[parent].right = middle
    n[parent].parent = node
    if middle:
        n[middle].parent = parent
    n[node].sum = n[parent].sum
    n[parent].sum = n[parent].weight + n[n[parent].left].sum + n[n[parent].right].sum


cdef inline void tree_link(Nodes *nodes, uint32_t *root, uint32_t node,
                           uint64_t hi, uint64_t lo, uint64_t weight) noexcept nogil:
    """Put a taken node into a tree under this key."""
    cdef Node *n = nodes.at
    cdef uint32_t parent = 0
    cdef uint32_t at = root[0]
    cdef bint left = False
    while at:
        parent = at
        n[at].sum += weight
        left = key_less(&n[at], hi, lo)
        at = n[at].left if left else n[at].right
    n[node].hi = hi
    n[node].lo = lo
    n[node].weight = weight
    n[node].sum = weight
    n[node].left = n[node].right = 0
    n[node].parent = parent
    if parent == 0:
        root[0] = node
    elif left:
        n[parent].left = node
    else:
        n[parent].right = node
    while n[node].parent and n[n[node].parent].priority < n[node].priority:
        rotate_up(nodes, root, node)


cdef inline void tree_unlink(Nodes *nodes, uint32_t *root, uint32_t node) noexcept nogil:
    """Take a node out of its tree; it stays taken."""
    cdef Node *n = nodes.at
    cdef uint32_t left, right, at
    cdef uint64_t weight = n[node].weight
    while True:
        left = n[node].left
        right = n[node].right
        if left == 0 or right == 0:
            break
        rotate_up(nodes, root, left if n[left].priority > n[right].priority else right)
    at = n[node].parent
    replace_child(nodes, root, at, node, left if left else right)
    while at:
        n[at].sum -= weight
        at = n[at].parent


cdef inline uint32_t tree_insert(Nodes *nodes, uint32_t *root, uint64_t hi, uint64_t lo,
                                 uint64_t weight, uint32_t payload) noexcept nogil:
    """The new node."""
    cdef uint32_t node = node_take(nodes)
    nodes.at[node].priority = <uint32_t>next_random(&nodes.random)
    nodes.at[node].payload = payload
    tree_link(nodes, root, node, hi, lo, weight)
    return node


cdef inline void tree_remove(Nodes *nodes, uint32_t *root, uint32_t node) noexcept nogil:
    tree_unlink(nodes, root, node)
    node_give_back(nodes, node)


cdef inline void tree_weigh(Nodes *nodes, uint32_t node, uint64_t weight) noexcept nogil:
    """Change a node's weight."""
    cdef Node *n = nodes.at
    cdef uint64_t change = weight - n[node].weight
    if change == 0:
        return
    n[node].weight = weight
    while node:
        n[node].sum += change
        node = n[node].parent


cdef inline uint32_t tree_first(Nodes *nodes, uint32_t root) noexcept nogil:
    """The node with the smallest key; 0: the tree is empty."""
    if root:
        while nodes.at[root].left:
            root = nodes.at[root].left
    return root


cdef inline uint32_t tree_last(Nodes *nodes, uint32_t root) noexcept nogil:
    if root:
        while nodes.at[root].right:
            root = nodes.at[root].right
    return root


cdef inline uint32_t tree_next(Nodes *nodes, uint32_t node) noexcept nogil:
    """The node after this one; 0: it is the last."""
    cdef uint32_t parent
    if nodes.at[node].right:
        return tree_first(nodes, nodes.at[node].right)
    parent = nodes.at[node].parent
    while parent and nodes.at[parent].right == node:
        node = parent
        parent = nodes.at[node].parent
    return parent


cdef inline uint32_t tree_pick(Nodes *nodes, uint32_t root, uint64_t rank) noexcept nogil:
    """The node at `rank` when each stands for as many places as it weighs; rank < the tree's sum."""
    cdef Node *n = nodes.at
    cdef uint64_t left
    while True:
        left = n[n[root].left].sum
        if rank < left:
            root = n[root].left
            continue
        rank -= left
        if rank < n[root].weight:
            return root
        rank -= n[root].weight
        root = n[root].right


cdef inline uint64_t tree_sum_through(Nodes *nodes, uint32_t root, uint64_t hi) noexcept nogil:
    """The weight of all nodes whose key's first half is at most `hi`."""
    cdef Node *n = nodes.at
    cdef uint64_t total = 0
    while root:
        if n[root].hi <= hi:
            total += n[n[root].left].sum + n[root].weight
            root = n[root].right
        else:
            root = n[root].left
    return total
