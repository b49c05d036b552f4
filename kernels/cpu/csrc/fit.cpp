// The search for scales: what kernels/ref/fit.py does, in the same order of additions, so with the same bits.
// Eight rows are one vector. Of a block, first its values are brought below each other.
#include <cstdint>
#include <cstring>

#include "matrix.h"

// What is to be encoded, and where to. Mirrored in __init__.py.
struct Search {
    const float *values;       // [rows, cols]
    const float *trials;       // [count, 2]
    const float *tensor_scale; // [tensor_scales], for E2M1
    const float *importance;   // [cols], or null
    uint8_t *codes, *scales;
    uint8_t *zeros; // of zeros, or null for codes without zero points
    float *noise;   // [rows]
    int64_t rows, cols, block, count, tensor_scales;
    int32_t kind, tile;
};

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif
#include <immintrin.h>

#include "floats.h"

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t MOST = 256; // values of a block
constexpr float F16_MAX = 65504.0f;
constexpr float SMALLEST = 0x1p-126f;  // whose inverse is finite
constexpr float TO_EVEN = 0x1.8p23f;   // adding and subtracting it rounds to whole numbers, halves to even

using V = __m256;
using I = __m256i;

inline V of(float x) { return _mm256_set1_ps(x); }
inline V choose(V mask, V yes, V no) { return _mm256_blendv_ps(no, yes, mask); }
inline V above(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline V least(V a, V b) { return _mm256_min_ps(a, b); }
inline V most(V a, V b) { return _mm256_max_ps(a, b); }
inline V size_of(V x) { return _mm256_andnot_ps(of(-0.0f), x); }
inline V clamped(V x, V low, V high) { return least(high, most(low, x)); }
inline V rounded(V x) { return (x + of(TO_EVEN)) - of(TO_EVEN); }
inline V half(V x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(clamped(x, of(-F16_MAX), of(F16_MAX)), 0)); }
inline V inverse_or_zero(V x) {
    return choose(_mm256_cmp_ps(size_of(x), of(SMALLEST), _CMP_GE_OQ), of(1) / x, of(0));
}

// Terms added up as the reference does: every fourth from the top, then the four sums.
struct Sum {
    V part[4];
    V total() const { return (part[0] + part[2]) + (part[1] + part[3]); }
};

// Eight rows' values of a block, and what each column counts.
struct Block {
    V x[MOST];
    const float *importance;
    int64_t size;
};

template <bool WEIGHTED> inline V weighted(V x, const Block &b, int64_t k) {
    return WEIGHTED ? x * _mm256_broadcast_ss(b.importance + k) : x;
}

// Where the rows at..at+lanes of one block go.
struct Place {
    const Search &s;
    int64_t row, lanes, block;

    // code(k): the vector of the block's column k, as whole numbers.
    template <int BITS, class Code> void put_codes(Code code) const {
        constexpr int64_t PER = 32 / BITS;
        const int64_t column = block * s.block;
        for (int64_t k = 0; k < s.block; k += PER) {
            I word = _mm256_setzero_si256();
            for (int64_t j = 0; j < PER; j++) {
                const I c = _mm256_and_si256(code(k + j), _mm256_set1_epi32((1 << BITS) - 1));
                const int by = s.tile ? static_cast<int>(j < 4 ? 8 * j : 8 * j - 28) : static_cast<int>(BITS * j);
                word = _mm256_or_si256(word, _mm256_slli_epi32(c, by));
            }
            if (s.tile) {
                uint8_t *run = s.codes + row / 16 * 8 * s.cols + (column + k) / 8 * 64 + row % 16 * 4;
                _mm256_storeu_si256(reinterpret_cast<I *>(run), word);
                continue;
            }
            uint32_t words[LANES];
            _mm256_storeu_si256(reinterpret_cast<I *>(words), word);
            for (int64_t i = 0; i < lanes; i++)
                std::memcpy(s.codes + (row + i) * s.cols * BITS / 8 + (column + k) * BITS / 8, &words[i], 4);
        }
    }
    template <class T> void put_scales(const T *scales) const {
        const int64_t blocks = s.cols / s.block;
        T *to = reinterpret_cast<T *>(s.scales);
        for (int64_t i = 0; i < lanes; i++)
            to[s.tile ? (row / 16 * blocks + block) * 16 + row % 16 + i : (row + i) * blocks + block] = scales[i];
    }
    void put_zeros(V zero) const {
        const int64_t blocks = s.cols / s.block;
        int32_t zeros[LANES];
        _mm256_storeu_si256(reinterpret_cast<I *>(zeros), _mm256_cvtps_epi32(zero));
        for (int64_t i = 0; i < lanes; i++) {
            const int64_t r = row + i;
            if (s.tile)
                s.zeros[(r / 16 * blocks + block) * 8 + r % 8] |= zeros[i] << (r % 16 / 8 * 4);
            else
                s.zeros[r * ((blocks + 1) / 2) + block / 2] |= zeros[i] << (block % 2 * 4);
        }
    }
};

inline V code_of(V x, V inverse, V low, V high) { return rounded(clamped(x * inverse, low, high)); }

template <bool WEIGHTED> V error(const Block &b, V step, V low, V high) {
    const V inverse = inverse_or_zero(step);
    Sum sum = {};
    for (int64_t k = 0; k < b.size; k += 4)
        for (int64_t j = 0; j < 4; j++) {
            const V x = b.x[k + j], off = code_of(x, inverse, low, high) * step - x;
            sum.part[j] += weighted<WEIGHTED>(off * off, b, k + j);
        }
    return sum.total();
}

// INT4, with or without zero points, and INT8. Returns what is lost.
template <bool WEIGHTED> V integers(const Block &b, const Place &place) {
    const Search &s = place.s;
    const bool affine = s.zeros != nullptr;
    const float high = s.kind == INT8 ? 127 : 7;
    const V lowest = of(s.kind == INT8 ? -127 : -8), highest = of(high), middle = of(s.kind == INT8 ? 0 : 8);
    const auto low_of = [&](V zero) { return affine ? of(0) - zero : lowest; };
    const auto high_of = [&](V zero) { return affine ? of(15) - zero : highest; };
    V top = b.x[0], bottom = b.x[0];
    for (int64_t k = 1; k < b.size; k++) top = most(top, b.x[k]), bottom = least(bottom, b.x[k]);
    const V magnitude = most(top, of(0) - bottom);
    // -8 has no counterpart: a scale of the sign that puts the extreme value there uses the whole range.
    const V extreme = choose(_mm256_cmp_ps(top, magnitude, _CMP_EQ_OQ), magnitude, of(0) - magnitude);
    top = most(top, of(0)), bottom = least(bottom, of(0));

    V best = of(0), scale = of(0), zero = middle;
    for (int64_t trial = 0; trial < s.count; trial++) {
        const float code = s.trials[2 * trial], shrink = s.trials[2 * trial + 1];
        V start, shift = middle;
        if (affine && code > 8) {
            start = (top - bottom) / of(code) * of(shrink);
            const V about = (of(0) - (bottom + top)) / of(2) * inverse_or_zero(start) + of(7.5f);
            shift = rounded(clamped(about, of(0), of(15)));
        } else {
            start = (code < 0 ? extreme : magnitude) / of(code) * of(shrink);
        }
        const V inverse = inverse_or_zero(start), low = low_of(shift), up = high_of(shift);
        Sum crosses = {}, squares = {};
        for (int64_t k = 0; k < b.size; k += 4)
            for (int64_t j = 0; j < 4; j++) {
                const V x = b.x[k + j], made = code_of(x, inverse, low, up), by = weighted<WEIGHTED>(made, b, k + j);
                crosses.part[j] += by * x;
                squares.part[j] += by * made;
            }
        const V cross = crosses.total(), square = squares.total();
        const V gain = choose(above(square, of(0)), cross * cross / square, of(0));
        const V better = above(gain, best);
        best = choose(better, gain, best);
        scale = choose(better, cross / square, scale);
        zero = choose(better, shift, zero);
    }
    V plain, plain_zero = middle;
    if (affine) {
        plain = half((top - bottom) / of(15));
        plain_zero = choose(above(plain, of(0)), (of(0) - bottom) / plain, of(0));
        plain_zero = rounded(clamped(plain_zero, of(0), of(15)));
    } else {
        plain = half(magnitude / highest);
    }
    V found = half(scale);
    const V simple = error<WEIGHTED>(b, plain, low_of(plain_zero), high_of(plain_zero));
    V lost = error<WEIGHTED>(b, found, low_of(zero), high_of(zero));
    const V worse = above(lost, simple);
    found = choose(worse, plain, found);
    zero = choose(worse, plain_zero, zero);
    const V low = low_of(zero), up = high_of(zero);
    lost = WEIGHTED ? error<false>(b, found, low, up) : choose(worse, simple, lost);

    const V inverse = inverse_or_zero(found);
    const auto code = [&](int64_t k) { return _mm256_cvtps_epi32(code_of(b.x[k], inverse, low, up) + zero); };
    if (s.kind == INT8)
        place.put_codes<8>(code);
    else
        place.put_codes<4>(code);
    uint16_t halves[LANES];
    _mm_storeu_si128(reinterpret_cast<__m128i *>(halves), _mm256_cvtps_ph(found, 0));
    place.put_scales(halves);
    if (affine) place.put_zeros(zero);
    return lost;
}

// What E4M3 codes 0..126 stand for.
inline V e4m3(I code) {
    const V normal = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(120 << 23)));
    const V small = _mm256_cvtepi32_ps(code) * of(0x1p-9f);
    return choose(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), code)), small, normal);
}
// The code nearest to x in 0..448, halves to even.
inline I to_e4m3(V x) {
    const I bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
    const I up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFFF)), odd);
    const I normal = _mm256_sub_epi32(_mm256_srli_epi32(up, 20), _mm256_set1_epi32(120 << 3));
    const I small = _mm256_cvtps_epi32(x * of(512));
    return _mm256_castps_si256(
        choose(above(of(0x1p-6f), x), _mm256_castsi256_ps(small), _mm256_castsi256_ps(normal)));
}

// The values of E2M1's grid nearest to x >= 0: see the reference.
inline V on_grid(V x) {
    const V power = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7F800000)));
    const V step = most(power, of(1)) * of(0.5f * TO_EVEN);
    return least((x + step) - step, of(6));
}

// NVFP4. Returns what is lost.
template <bool WEIGHTED> V e2m1(const Block &b, const Place &place, V tensor_scale) {
    const Search &s = place.s;
    const V unit = choose(above(tensor_scale, of(0)), tensor_scale, of(__builtin_inff()));
    Block size; // of the values, in the tensor scale's unit
    size.importance = b.importance, size.size = b.size;
    V top = of(0);
    for (int64_t k = 0; k < b.size; k++) {
        size.x[k] = size_of(b.x[k] / unit);
        top = most(top, size.x[k]);
    }
    const I centre = to_e4m3(least(top / of(6), of(448)));
    const auto lost_with = [&](V scale) {
        const V inverse = inverse_or_zero(scale);
        Sum sum = {};
        for (int64_t k = 0; k < b.size; k += 4)
            for (int64_t j = 0; j < 4; j++) {
                const V x = size.x[k + j] * inverse, off = on_grid(x) - x;
                sum.part[j] += weighted<WEIGHTED>(off * off, size, k + j);
            }
        return choose(above(scale, of(0)), sum.total() * (scale * scale), of(__builtin_inff()));
    };
    V best = lost_with(e4m3(centre));
    I chosen = centre;
    for (int64_t trial = 0; trial < s.count; trial++) {
        I code = _mm256_add_epi32(centre, _mm256_set1_epi32(static_cast<int32_t>(s.trials[2 * trial])));
        code = _mm256_min_epi32(_mm256_max_epi32(code, _mm256_setzero_si256()), _mm256_set1_epi32(126));
        const V lost = lost_with(e4m3(code)), better = above(best, lost);
        chosen = _mm256_castps_si256(choose(better, _mm256_castsi256_ps(code), _mm256_castsi256_ps(chosen)));
        best = least(lost, best);
    }
    const V scale = e4m3(chosen), inverse = inverse_or_zero(scale), sign = of(-0.0f);
    Sum sum = {};
    for (int64_t k = 0; k < b.size; k++) {
        const V near = on_grid(size.x[k] * inverse);
        // A value that vanishes in the tensor scale's unit has lost its sign.
        const V minus = _mm256_and_ps(_mm256_and_ps(above(of(0), b.x[k]), above(size.x[k], of(0))), sign);
        const V off = _mm256_or_ps(near, minus) * scale * tensor_scale - b.x[k];
        sum.part[k % 4] += off * off;
        size.x[k] = _mm256_or_ps(near, minus);
    }
    place.put_codes<4>([&](int64_t k) {
        const V near = size_of(size.x[k]);
        const I code = _mm256_cvtps_epi32(least(least(near * of(2), near + of(2)), near * of(0.5f) + of(4)));
        return _mm256_or_si256(code, _mm256_slli_epi32(_mm256_srli_epi32(_mm256_castps_si256(size.x[k]), 31), 3));
    });
    int32_t codes[LANES];
    uint8_t bytes[LANES];
    _mm256_storeu_si256(reinterpret_cast<I *>(codes), chosen);
    for (int64_t i = 0; i < LANES; i++) bytes[i] = static_cast<uint8_t>(codes[i]);
    place.put_scales(bytes);
    return sum.total();
}

template <bool WEIGHTED> void all_blocks(const Search &s) {
    float last[LANES * MOST] = {}; // the rows that are left, and zeros
    Block b;
    b.size = s.block;
    for (int64_t row = 0; row < s.rows; row += LANES) {
        const int64_t lanes = s.rows - row < LANES ? s.rows - row : LANES;
        V tensor_scale = of(0);
        if (s.kind == E2M1) {
            float own[LANES] = {};
            for (int64_t i = 0; i < lanes; i++) own[i] = s.tensor_scale[(row + i) * s.tensor_scales / s.rows];
            tensor_scale = _mm256_loadu_ps(own);
        }
        V noise = of(0);
        for (int64_t block = 0; block < s.cols / s.block; block++) {
            const float *from = s.values + row * s.cols + block * s.block;
            int64_t step = s.cols;
            if (lanes < LANES) {
                for (int64_t i = 0; i < lanes; i++)
                    std::memcpy(last + i * MOST, from + i * step, sizeof(float) * s.block);
                from = last, step = MOST;
            }
            float *to = reinterpret_cast<float *>(b.x);
            for (int64_t k = 0; k < s.block; k += 8) transpose8(from + k, step, to + k * LANES, LANES);
            if (WEIGHTED) b.importance = s.importance + block * s.block;
            const Place place{s, row, lanes, block};
            noise += s.kind == E2M1 ? e2m1<WEIGHTED>(b, place, tensor_scale) : integers<WEIGHTED>(b, place);
        }
        float each[LANES];
        _mm256_storeu_ps(each, noise);
        std::memcpy(s.noise + row, each, sizeof(float) * lanes);
    }
}

} // namespace

// Blocks have up to 256 values, a multiple of 8 of them; tiles have whole ones of 16 rows.
extern "C" void qwenrun_cpu_fit(const Search *s) {
    if (s->importance)
        all_blocks<true>(*s);
    else
        all_blocks<false>(*s);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
extern "C" void qwenrun_cpu_fit(const Search *) {}
#endif
