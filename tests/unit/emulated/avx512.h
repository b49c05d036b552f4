// The AVX-512 and VNNI operations that kernels/cpu/csrc/tiles_avx512.cpp uses, in plain C++: what they compute, by
// Intel's description of them, on a processor that lacks them. Put in their place by macros; slow.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Bits {
    uint8_t b[64];
};

template <typename T> struct Lanes {
    T v[64 / sizeof(T)];
};
template <typename T> Lanes<T> lanes(Bits x) {
    Lanes<T> out;
    std::memcpy(&out, &x, 64);
    return out;
}
template <typename T> Bits bits(Lanes<T> x) {
    Bits out;
    std::memcpy(&out, &x, 64);
    return out;
}
template <typename T, typename F> Bits each(Bits x, F &&f) {
    Lanes<T> a = lanes<T>(x);
    for (T &v : a.v) v = f(v);
    return bits(a);
}
template <typename T, typename F> Bits pairs(Bits x, Bits y, F &&f) {
    Lanes<T> a = lanes<T>(x), b = lanes<T>(y);
    for (unsigned i = 0; i < 64 / sizeof(T); ++i) a.v[i] = f(a.v[i], b.v[i]);
    return bits(a);
}

inline Bits zero() { return Bits{}; }
inline Bits load(const void *at) {
    Bits out;
    std::memcpy(&out, at, 64);
    return out;
}
inline void store(void *at, Bits x) { std::memcpy(at, &x, 64); }
inline Bits set8(char c) { return each<int8_t>(zero(), [=](int8_t) { return static_cast<int8_t>(c); }); }
inline Bits set32(int32_t i) { return each<int32_t>(zero(), [=](int32_t) { return i; }); }
inline Bits setf(float f) { return each<float>(zero(), [=](float) { return f; }); }
inline Bits both(Bits x, Bits y) { return pairs<uint64_t>(x, y, [](uint64_t a, uint64_t b) { return a & b; }); }
inline Bits right16(Bits x, int n) {
    return each<uint16_t>(x, [=](uint16_t a) { return static_cast<uint16_t>(a >> n); });
}
inline Bits left32(Bits x, int n) { return each<uint32_t>(x, [=](uint32_t a) { return a << n; }); }
inline Bits repeat(__m128i x) {
    Bits out;
    for (int i = 0; i < 4; ++i) std::memcpy(out.b + 16 * i, &x, 16);
    return out;
}
// Within each 128 bits.
inline Bits shuffle(Bits table, Bits index) {
    Bits out;
    for (int i = 0; i < 64; ++i) out.b[i] = index.b[i] & 0x80 ? 0 : table.b[i / 16 * 16 + (index.b[i] & 15)];
    return out;
}
// Four products of an unsigned and a signed byte, added to each 32 bits without saturation.
inline Bits dot(Bits sum, Bits x, Bits y) {
    Lanes<int32_t> s = lanes<int32_t>(sum);
    const Lanes<int8_t> signs = lanes<int8_t>(y);
    for (int i = 0; i < 64; ++i) s.v[i / 4] += static_cast<int32_t>(x.b[i]) * signs.v[i];
    return bits(s);
}
inline Bits add32(Bits x, Bits y) {
    return pairs<uint32_t>(x, y, [](uint32_t a, uint32_t b) { return a + b; });
}
inline Bits halves(__m256i x) {
    Lanes<float> out;
    uint16_t h[16];
    std::memcpy(h, &x, 32);
    for (int i = 0; i < 16; ++i) out.v[i] = _cvtsh_ss(h[i]);
    return bits(out);
}
inline Bits widen(__m128i x) {
    Lanes<uint32_t> out;
    uint8_t b[16];
    std::memcpy(b, &x, 16);
    for (int i = 0; i < 16; ++i) out.v[i] = b[i];
    return bits(out);
}
inline uint16_t without(Bits x, Bits y) {
    const Lanes<uint32_t> a = lanes<uint32_t>(both(x, y));
    uint16_t out = 0;
    for (int i = 0; i < 16; ++i) out |= (a.v[i] == 0) << i;
    return out;
}
inline Bits choose(Bits no, uint16_t mask, Bits yes) {
    Lanes<uint32_t> a = lanes<uint32_t>(no);
    const Lanes<uint32_t> b = lanes<uint32_t>(yes);
    for (int i = 0; i < 16; ++i) a.v[i] = mask >> i & 1 ? b.v[i] : a.v[i];
    return bits(a);
}
inline Bits floats(Bits x) {
    const Lanes<int32_t> a = lanes<int32_t>(x);
    Lanes<float> out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<float>(a.v[i]);
    return bits(out);
}
inline Bits low(__m256i x) {
    Bits out = {};
    std::memcpy(&out, &x, 32);
    return out;
}
inline Bits insert(Bits x, __m256i y, int half) {
    std::memcpy(x.b + 32 * half, &y, 32);
    return x;
}
inline Bits times(Bits x, Bits y) {
    return pairs<float>(x, y, [](float a, float b) { return a * b; });
}
inline Bits fma(Bits x, Bits y, Bits z, float sign) {
    const Lanes<float> a = lanes<float>(x), b = lanes<float>(y);
    Lanes<float> c = lanes<float>(z);
    for (int i = 0; i < 16; ++i) c.v[i] = std::fma(a.v[i], b.v[i], sign * c.v[i]);
    return bits(c);
}

}  // namespace emulated

#define __m512i emulated::Bits
#define __m512 emulated::Bits
#define _mm512_setzero_ps emulated::zero
#define _mm512_setzero_si512 emulated::zero
#define _mm512_loadu_si512 emulated::load
#define _mm512_storeu_ps emulated::store
#define _mm512_set1_epi8 emulated::set8
#define _mm512_set1_epi32 emulated::set32
#define _mm512_set1_ps emulated::setf
#define _mm512_and_si512 emulated::both
#define _mm512_srli_epi16 emulated::right16
#define _mm512_slli_epi32 emulated::left32
#define _mm512_broadcast_i32x4 emulated::repeat
#define _mm512_shuffle_epi8 emulated::shuffle
#define _mm512_dpbusd_epi32 emulated::dot
#define _mm512_add_epi32 emulated::add32
#define _mm512_cvtph_ps emulated::halves
#define _mm512_cvtepu8_epi32 emulated::widen
#define _mm512_testn_epi32_mask emulated::without
#define _mm512_mask_mov_epi32 emulated::choose
#define _mm512_castsi512_ps
#define _mm512_cvtepi32_ps emulated::floats
#define _mm512_castsi256_si512 emulated::low
#define _mm512_inserti64x4 emulated::insert
#define _mm512_mul_ps emulated::times
#define _mm512_fmadd_ps(x, y, z) emulated::fma(x, y, z, 1.0f)
#define _mm512_fmsub_ps(x, y, z) emulated::fma(x, y, z, -1.0f)
