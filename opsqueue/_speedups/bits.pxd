"""Bit counting, hashing, random numbers and memory that must be there. Owns no state, knows no submission."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from *:
    """
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <time.h>
    #define opsqueue_lowest(x) ((uint32_t)__builtin_ctzll(x))
    #define opsqueue_highest(x) (63u - (uint32_t)__builtin_clzll(x))
    #define opsqueue_prefetch(at) __builtin_prefetch(at)
    #define opsqueue_scaled(x, n) ((uint64_t)(((unsigned __int128)(x) * (n)) >> 64))
    /* Without -mpopcnt the builtin is a call into a table; this stays in registers. */
    static inline uint32_t opsqueue_popcount(uint64_t x) {
        x = x - ((x >> 1) & 0x5555555555555555ULL);
        x = (x & 0x3333333333333333ULL) + ((x >> 2) & 0x3333333333333333ULL);
        x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
        return (uint32_t)((x * 0x0101010101010101ULL) >> 56);
    }
    /* The hot paths cannot report a lack of memory; the process ends and its successor recovers from the journal. */
    static inline void *opsqueue_must(void *memory) {
        if (memory == NULL) {
            fputs("opsqueue: the engine found no memory; the process ends, the journal has what was stored\\n", stderr);
            abort();
        }
        return memory;
    }
    static inline uint64_t opsqueue_clock_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
    }
    """
    uint32_t lowest_bit "opsqueue_lowest"(uint64_t x) noexcept nogil          # x != 0
    uint32_t highest_bit "opsqueue_highest"(uint64_t x) noexcept nogil        # x != 0
    uint64_t scaled "opsqueue_scaled"(uint64_t x, uint64_t n) noexcept nogil  # x / 2**64 * n
    uint32_t popcount "opsqueue_popcount"(uint64_t x) noexcept nogil
    void prefetch "opsqueue_prefetch"(const void *at) noexcept nogil          # any address will do
    void *must "opsqueue_must"(void *memory) noexcept nogil
    uint64_t clock_ns "opsqueue_clock_ns"() noexcept nogil


cdef inline uint32_t select_bit(uint64_t word, uint32_t rank) noexcept nogil:
    """Position of the set bit with `rank` set bits below it; there is one."""
    cdef uint32_t base = 0
    cdef uint32_t count = popcount(word & 0xFFFFFFFFU)
    if rank >= count:
        rank -= count
        base = 32
    count = popcount((word >> base) & 0xFFFF)
    if rank >= count:
        rank -= count
        base += 16
    word >>= base
    while rank:
        word &= word - 1
        rank -= 1
    return base + lowest_bit(word)


cdef inline uint64_t mixed(uint64_t x) noexcept nogil:
    """splitmix64's finalizer (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x ^= x >> 30
    x *= <uint64_t>0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= <uint64_t>0x94D049BB133111EB
    x ^= x >> 31
    return x


cdef inline uint64_t next_random(uint64_t *state) noexcept nogil:
    """splitmix64: 64 random bits."""
    state[0] += <uint64_t>0x9E3779B97F4A7C15
    return mixed(state[0])


cdef inline uint64_t random_below(uint64_t *state, uint64_t bound) noexcept nogil:
    """A number from 0 to bound - 1; the bias is below bound / 2**64."""
    return scaled(next_random(state), bound)
