// Kernels for tiled matrices (16 rows interleaved), one set an instruction set. See tiles_body.h.
#pragma once
#include "matrix.h"

struct Tiles {
    const char *name;
    // Rounds one row of x float [cols] for w.
    void (*round)(const Matrix &w, const float *x, int8_t *codes, float *scales, float *less);
    // Tiles first..last of w times `count` rows of activations: out[n * stride + 16 * (tile - first) + row].
    void (*times)(const Matrix &w, int64_t first, int64_t last, const Rounded &acts, const int64_t *rows,
                  int64_t count, float *out, int64_t stride);
    // gate[i] = silu(gate[i]) * up[i].
    void (*silu_times)(float *gate, const float *up, int64_t count);
};

// Null where the library was built for another processor.
const Tiles *tiles_avx2();
const Tiles *tiles_avx512();
