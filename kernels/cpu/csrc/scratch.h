// Memory of the calling thread that stays when a call ends: fresh pages cost more than the arithmetic on them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

// Who holds memory while others run below it: every use has a slot of its own.
enum Slot : int {
    CODES,          // a call's activations, rounded for tiles, and their scales
    SCALES,
    INNER_CODES,    // the same, of what experts have between their two matrices
    INNER_SCALES,
    PAIRS,          // a row for every pair of token and expert
    TASK,           // what one task of a loop makes
    NORMED,         // what the matrices of one call read, after the norm
    GATES,          // gate and up of a SwiGLU
    ENTRY,          // what a layer's router and shared expert make
    KEYS_PART,      // a call of attention or of the delta rule
    QUERIES_PART,
    MIXED_PART,
    DECAY_PART,
    SLOTS
};

// Room for `count` numbers in whole cache lines, with whatever is there.
template <typename T> T *scratch(Slot slot, int64_t count) {
    struct Piece {
        void *data = nullptr;
        int64_t size = 0;
        ~Piece() { std::free(data); }
    };
    thread_local Piece pieces[SLOTS];
    Piece &piece = pieces[slot];
    const int64_t wanted = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (piece.size < wanted) {
        std::free(piece.data);
        piece.size = 0;
        piece.data = std::aligned_alloc(64, wanted);
        if (!piece.data) throw std::bad_alloc();
        piece.size = wanted;
    }
    return static_cast<T *>(piece.data);
}
