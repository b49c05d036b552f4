// What the kernels are told of a matrix, and of activations rounded for it.
#pragma once
#include <cstdint>

enum Codes : int32_t { INT4 = 0, INT8 = 1, E2M1 = 2, BF16 = 3 };
enum Scale : int32_t { F16 = 0, E4M3 = 1, E8M0 = 2 };

// A matrix [rows, cols], or the first of a stack whose parts are `*_step` bytes apart. Mirrored in __init__.py.
struct Matrix {
    const uint8_t *codes, *scales, *zeros;
    const float *tensor_scale;
    int64_t rows, cols, block, tensor_scales;
    int64_t codes_step, scales_step, zeros_step, tensor_step;
    int32_t kind, scale, tile;
};

// Rows of activations rounded for a tiled matrix: codes int8 [rows, cols]; for each block its scale, and what the
// block's scaled sum is too large by because codes are stored as numbers >= 0: scale x sum of codes x 8 (int4), x 12
// (e2m1), or x 1 where zero points say by how much. Both are multiplied by the constant the weights' scales lack.
struct Rounded {
    const int8_t *codes;
    const float *scales, *less;
    int64_t cols, step;
};
