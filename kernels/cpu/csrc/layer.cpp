// What a layer does beside products with matrices: norms, rotary, the causal convolution, the gated delta rule,
// attention over a KV cache. Float32 arithmetic; a token's bits do not depend on how many tokens a call has.
// Needs AVX2, FMA and F16C: the caller has asked for them. Knows no Python object and no torch.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#endif

#include "floats.h"

namespace {

// Few and small: not worth waking anybody.
template <typename F> void each(int64_t count, int64_t floats_each, F &&body) {
    if (count * floats_each < 8192) {
        for (int64_t i = 0; i < count; ++i) body(i);
    } else {
        Pool::get().each(count, body);
    }
}

inline void norm_row(const float *x, const float *w, float shift, float eps, int64_t size, float *out) {
    const float by = 1.0f / std::sqrt(dot(x, x, size) / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * by * (w[i] + shift);
}

constexpr int64_t TAPS = 8;       // of a convolution, at most
constexpr int64_t CHANNELS = 512; // a task of a convolution
constexpr int64_t SLICE = 32;     // values of a head that one task of the delta rule carries
constexpr int64_t KEYS = 512;     // keys and values that one task of attention reads
constexpr int64_t FEW = 16;       // of them converted to float at a time
constexpr int64_t TOGETHER = 8;   // tokens whose queries read the cache together

// What a slice of a head's state, rows of `dv` floats apart, holds for k: state^T k.
template <int V> inline void delta_held(const float *state, int64_t dk, int64_t dv, const float *k, v8 *held) {
    v8 sum[V];
    for (int i = 0; i < V; ++i) sum[i] = v8{};
    for (int64_t d = 0; d < dk; ++d) {
        const v8 by = all8(k[d]);
        for (int i = 0; i < V; ++i) sum[i] = fma8(load8(state + d * dv + 8 * i), by, sum[i]);
    }
    for (int i = 0; i < V; ++i) held[i] = sum[i];
}

// One token: the slice decays, is corrected by k, is read by q. held: what it holds for k; then what it holds for
// `next`, the key of the token after (any key if there is none): the state passes the registers once a token.
template <int V> inline void delta_token(float *state, int64_t dk, int64_t dv, const float *q, const float *k,
                                         const float *next, const float *v, float decay, float beta, v8 *held,
                                         float *out) {
    v8 error[V], read[V], ahead[V];
    const v8 g = all8(decay), b = all8(beta);
    for (int i = 0; i < V; ++i) error[i] = b * (load8(v + 8 * i) - g * held[i]), read[i] = ahead[i] = v8{};
    for (int64_t d = 0; d < dk; ++d) {
        const v8 key = all8(k[d]), query = all8(q[d]), then = all8(next[d]);
        for (int i = 0; i < V; ++i) {
            float *at = state + d * dv + 8 * i;
            const v8 s = fma8(key, error[i], g * load8(at));
            store8(at, s);
            read[i] = fma8(s, query, read[i]);
            ahead[i] = fma8(s, then, ahead[i]);
        }
    }
    for (int i = 0; i < V; ++i) store8(out + 8 * i, read[i]), held[i] = ahead[i];
}

// All tokens on V vectors of a head's values. q, k [tokens, dk]; v and out have rows v_step and out_step apart.
template <int V>
inline void delta_slice(float *state, int64_t tokens, int64_t dk, int64_t dv, const float *q, const float *k,
                        const float *v, int64_t v_step, const float *decay, const float *beta, int64_t step, float *out,
                        int64_t out_step) {
    v8 held[V];
    delta_held<V>(state, dk, dv, k, held);
    for (int64_t t = 0; t < tokens; ++t) {
        const float *next = t + 1 < tokens ? k + dk : k;
        delta_token<V>(state, dk, dv, q, k, next, v, decay[t * step], beta[t * step], held, out);
        q += dk, k += dk, v += v_step, out += out_step;
    }
}

// `width` floats of one key or value as float32.
inline void to_float(const void *data, int32_t kind, const uint16_t *scales, int64_t row, int64_t at, int64_t width,
                     float *out) {
    if (kind == 0) {
        std::memcpy(out, static_cast<const float *>(data) + at, width * sizeof(float));
    } else if (kind == 1) {
        const uint16_t *from = static_cast<const uint16_t *>(data) + at;
        for (int64_t i = 0; i < width; ++i) {
            const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
            std::memcpy(out + i, &bits, 4);
        }
    } else {
        // A half float's bits, moved to a float's place, are 2^-112 of it; infinities do not occur.
        const uint32_t half = scales[row], bits = (half & 0x7FFFu) << 13;
        float scale;
        std::memcpy(&scale, &bits, 4);
        scale *= half & 0x8000u ? -0x1p112f : 0x1p112f;
        const int8_t *from = static_cast<const int8_t *>(data) + at;
        for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(from[i]) * scale;
    }
}

struct Cache {
    const void *k, *v;
    const uint16_t *k_scales, *v_scales;
    int32_t kind;
    int64_t groups, size;
};

// `count` tokens' queries of one key head: `shared` rows of a token follow each other, tokens lie `stride` apart. The
// first token stands at position `first`.
struct Queries {
    const float *q;
    int64_t size, stride, shared, count, first;
    float scale;
    const float *row(int64_t m) const { return q + m / shared * stride + m % shared * size; }
};

// Products of M queries with FEW keys, given dimension by dimension [size, FEW]: out[m * FEW + s].
template <int M> inline void products(const Queries &queries, int64_t from, const float *keys, float *out) {
    const float *q[M];
    v8 sum[M][2];
    for (int m = 0; m < M; ++m) q[m] = queries.row(from + m), sum[m][0] = sum[m][1] = v8{};
    for (int64_t i = 0; i < queries.size; ++i) {
        const v8 a = load8(keys + i * FEW), b = load8(keys + i * FEW + 8);
        for (int m = 0; m < M; ++m) {
            const v8 x = all8(q[m][i]);
            sum[m][0] = fma8(x, a, sum[m][0]);
            sum[m][1] = fma8(x, b, sum[m][1]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < 2; ++j) store8(out + (from + m) * FEW + 8 * j, sum[m][j] * all8(queries.scale));
}

// What M queries have mixed so far, `entry` floats apart, shrunk by `less`, plus FEW rows times their weights.
template <int M>
inline void mix(float *mixed, int64_t entry, const float *less, const float *weights, const float *rows, int64_t size) {
    for (int64_t i = 0; i < size;) {
        const int width = i + 32 <= size ? 4 : 1;
        v8 a[M][4];
        auto pass = [&](auto wide) {
            constexpr int V = decltype(wide)::value;
            for (int m = 0; m < M; ++m)
                for (int j = 0; j < V; ++j) a[m][j] = load8(mixed + m * entry + i + 8 * j) * all8(less[m]);
            for (int64_t s = 0; s < FEW; ++s) {
                v8 row[V];
                for (int j = 0; j < V; ++j) row[j] = load8(rows + s * size + i + 8 * j);
                for (int m = 0; m < M; ++m) {
                    const v8 w = all8(weights[m * FEW + s]);
                    for (int j = 0; j < V; ++j) a[m][j] = fma8(w, row[j], a[m][j]);
                }
            }
            for (int m = 0; m < M; ++m)
                for (int j = 0; j < V; ++j) store8(mixed + m * entry + i + 8 * j, a[m][j]);
        };
        if (width == 4) pass(std::integral_constant<int, 4>{});
        else pass(std::integral_constant<int, 1>{});
        i += 8 * width;
    }
}

// Of a query's result in one run: the largest score, the sum, and from MIXED on, in whole vectors, the mixed values.
constexpr int64_t MIXED = 8;

// One run of at most KEYS cached rows, of `length` in all: what each query makes of it.
inline void attend_run(const Cache &cache, const Queries &queries, int64_t group, int64_t run, int64_t length, float *part) {
    static_assert(FEW == 16, "two vectors");
    const int64_t size = cache.size, entry = size + MIXED, many = queries.shared * queries.count;
    const int64_t first = run * KEYS, last = first + KEYS < length ? first + KEYS : length;
    float *rows = scratch<float>(MIXED_PART, 2 * FEW * size + many * (FEW + 1)), *keys = rows + FEW * size;
    float *scores = keys + FEW * size, *less = scores + many * FEW;
    for (int64_t m = 0; m < many; ++m) {
        part[m * entry] = -__builtin_inff();
        std::memset(part + m * entry + 1, 0, (entry - 1) * sizeof(float));
    }
    auto fetch = [&](const void *data, const uint16_t *scales, int64_t low, int64_t count) {
        for (int64_t s = 0; s < count; ++s) {
            const int64_t row = (low + s) * cache.groups + group;
            to_float(data, cache.kind, scales, row, row * size, size, rows + s * size);
        }
        std::memset(rows + count * size, 0, (FEW - count) * size * sizeof(float));
    };
    for (int64_t low = first; low < last; low += FEW) {
        const int64_t count = last - low < FEW ? last - low : FEW;
        // Queries before this one are of tokens that see none of these rows.
        const int64_t blind = low > queries.first ? (low - queries.first) * queries.shared : 0;
        fetch(cache.k, cache.k_scales, low, count);
        for (int64_t i = 0; i < size; i += 8)
            for (int64_t s = 0; s < FEW; s += 8) transpose8(rows + s * size + i, size, keys + i * FEW + s, FEW);
        int64_t m = blind;
        for (; m + 4 <= many; m += 4) products<4>(queries, m, keys, scores);
        for (; m < many; ++m) products<1>(queries, m, keys, scores);
        fetch(cache.v, cache.v_scales, low, count);
        for (m = blind; m < many; ++m) {
            const int64_t position = queries.first + m / queries.shared, seen = position + 1 - low;
            float *top = part + m * entry, *score = scores + m * FEW;
            for (int64_t s = seen < count ? seen : count; s < FEW; ++s) score[s] = -__builtin_inff();
            v8 a = load8(score), b = load8(score + 8);
            // A score that is not a number may be passed over here: its own weight below is not a number either.
            const float here = max8(pick8(a > b, a, b)), most = here > top[0] ? here : top[0];
            a = exp8(a - all8(most));
            b = exp8(b - all8(most));
            store8(score, a);
            store8(score + 8, b);
            less[m] = most == top[0] ? 1.0f : exp_float(top[0] - most);
            top[0] = most;
            top[1] = top[1] * less[m] + sum8(a + b);
        }
        for (m = blind; m + 2 <= many; m += 2)
            mix<2>(part + m * entry + MIXED, entry, less + m, scores + m * FEW, rows, size);
        if (m < many) mix<1>(part + m * entry + MIXED, entry, less + m, scores + m * FEW, rows, size);
    }
}

// The runs' results of all queries, put together in their order.
inline void merge_runs(const Queries &queries, int64_t runs, int64_t size, const float *parts, float *out) {
    const int64_t entry = size + MIXED, many = queries.shared * queries.count;
    for (int64_t m = 0; m < many; ++m) {
        float most = -__builtin_inff(), total = 0.0f;
        float *to = out + m / queries.shared * queries.stride + m % queries.shared * size;
        for (int64_t run = 0; run < runs; ++run) {
            const float top = parts[(run * many + m) * entry];
            most = top > most ? top : most;
        }
        std::memset(to, 0, size * sizeof(float));
        for (int64_t run = 0; run < runs; ++run) {
            const float *part = parts + (run * many + m) * entry;
            if (part[1] == 0.0f) continue;  // it saw none of the run
            const float by = exp_float(part[0] - most);
            total += by * part[1];
            for (int64_t i = 0; i < size; ++i) to[i] += by * part[MIXED + i];
        }
        for (int64_t i = 0; i < size; ++i) to[i] /= total;
    }
}

}  // namespace

extern "C" {

// out [rows, size]: each row of x times 1 / rms, times (w + shift).
void qwenrun_cpu_rms_norm(const float *x, const float *w, float shift, float eps, int64_t rows, int64_t size,
                          float *out) {
    each(rows, size, [&](int64_t r) { norm_row(x + r * size, w, shift, eps, size, out + r * size); });
}

// out [rows, size]: rms norm of o with the plain weight w, times silu(z).
void qwenrun_cpu_gated_rms_norm(const float *o, const float *w, const float *z, float eps, int64_t rows, int64_t size,
                                float *out) {
    each(rows, size, [&](int64_t r) {
        float *to = out + r * size;
        const float *gate = z + r * size;
        norm_row(o + r * size, w, 0.0f, eps, size, to);
        by_eights(size, [&](int64_t i, int64_t lanes) {
            store_some(to + i, load_some(to + i, lanes) * silu8(load_some(gate + i, lanes)), lanes);
        });
    });
}

// out [T, heads, size]: x with its first 2 x half dimensions turned by cos, sin [T, half].
void qwenrun_cpu_rope(const float *x, const float *cos, const float *sin, int64_t tokens, int64_t heads, int64_t size,
                      int64_t half, float *out) {
    each(tokens * heads, size, [&](int64_t row) {
        const float *a = x + row * size, *c = cos + row / heads * half, *s = sin + row / heads * half;
        float *to = out + row * size;
        for (int64_t i = 0; i < half; ++i) {
            to[i] = a[i] * c[i] - a[half + i] * s[i];
            to[half + i] = a[half + i] * c[i] + a[i] * s[i];
        }
        std::memcpy(to + 2 * half, a + 2 * half, (size - 2 * half) * sizeof(float));
    });
}

// out [T, C]: silu of the causal convolution of u [T, C] with w [C, taps]; state [taps - 1, C] moves on.
void qwenrun_cpu_conv(const float *u, const float *w, float *state, int64_t tokens, int64_t channels, int64_t taps,
                      float *out) {
    const int64_t before = taps - 1;
    each((channels + CHANNELS - 1) / CHANNELS, CHANNELS * tokens, [&](int64_t task) {
        const int64_t first = task * CHANNELS, count = channels - first < CHANNELS ? channels - first : CHANNELS;
        float by[TAPS][CHANNELS] = {};
        for (int64_t c = 0; c < count; ++c)
            for (int64_t j = 0; j < taps; ++j) by[j][c] = w[(first + c) * taps + j];
        auto row = [&](int64_t t) { return (t < 0 ? state + (t + before) * channels : u + t * channels) + first; };
        for (int64_t t = 0; t < tokens; ++t) {
            const float *x[TAPS];
            for (int64_t j = 0; j < taps; ++j) x[j] = row(t - before + j);
            by_eights(count, [&](int64_t c, int64_t lanes) {
                v8 sum = {};
                for (int64_t j = 0; j < taps; ++j) sum = fma8(load8(by[j] + c), load_some(x[j] + c, lanes), sum);
                store_some(out + t * channels + first + c, silu8(sum), lanes);
            });
        }
        for (int64_t j = 0; j < before; ++j) {
            const float *x = row(tokens - before + j);
            if (x != state + j * channels + first) std::memcpy(state + j * channels + first, x, count * sizeof(float));
        }
    });
}

// The gated delta rule over T tokens; q, k, v have rows `stride` floats apart. See kernels/ops.py.
void qwenrun_cpu_delta_rule(const float *q, const float *k, const float *v, const float *g, const float *beta,
                            float *state, int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t dk,
                            int64_t dv, int64_t q_stride, int64_t k_stride, int64_t v_stride, float *out) {
    float *keys = scratch<float>(KEYS_PART, tokens * key_heads * dk), *queries = scratch<float>(QUERIES_PART, tokens * key_heads * dk);
    const float root = 1.0f / std::sqrt(static_cast<float>(dk));
    each(tokens * key_heads, 2 * dk, [&](int64_t i) {
        const int64_t t = i / key_heads, h = i % key_heads;
        const float *x = k + t * k_stride + h * dk, *y = q + t * q_stride + h * dk;
        float *key = keys + (h * tokens + t) * dk, *query = queries + (h * tokens + t) * dk;
        const float a = 1.0f / std::sqrt(dot(x, x, dk) + 1e-6f), b = root / std::sqrt(dot(y, y, dk) + 1e-6f);
        for (int64_t d = 0; d < dk; ++d) key[d] = x[d] * a, query[d] = y[d] * b;
    });
    const int64_t slices = (dv + SLICE - 1) / SLICE, shared = value_heads / key_heads;
    float *decay = scratch<float>(DECAY_PART, tokens * value_heads);
    by_eights(tokens * value_heads, [&](int64_t i, int64_t lanes) {
        store_some(decay + i, exp8(load_some(g + i, lanes)), lanes);
    });
    each(value_heads * slices, SLICE * dk, [&](int64_t task) {
        const int64_t head = task / slices, from = task % slices * SLICE, v_step = v_stride, step = value_heads;
        const int64_t width = dv - from < SLICE ? dv - from : SLICE, out_step = value_heads * dv;
        const float *key = keys + head / shared * tokens * dk, *query = queries + head / shared * tokens * dk;
        const float *value = v + head * dv + from, *gone = decay + head, *b = beta + head;
        float *s = state + head * dk * dv + from, *to = out + head * dv + from;
        if (width == SLICE)
            return delta_slice<SLICE / 8>(s, tokens, dk, dv, query, key, value, v_step, gone, b, step, to, out_step);
        int64_t i = 0;
        for (; i + 8 <= width; i += 8)
            delta_slice<1>(s + i, tokens, dk, dv, query, key, value + i, v_step, gone, b, step, to + i, out_step);
        for (; i < width; ++i) {
            for (int64_t t = 0; t < tokens; ++t) {
                const float *x = key + t * dk, *y = query + t * dk;
                float held = 0.0f, read = 0.0f;
                for (int64_t d = 0; d < dk; ++d) held += s[d * dv + i] * x[d];
                held = b[t * step] * (value[t * v_step + i] - gone[t * step] * held);
                for (int64_t d = 0; d < dk; ++d) {
                    s[d * dv + i] = gone[t * step] * s[d * dv + i] + x[d] * held;
                    read += s[d * dv + i] * y[d];
                }
                to[t * out_step + i] = read;
            }
        }
    });
}

// A DeltaNet layer between its projections: qkv [T, C] and z [T, nv, dv], b and a [T, nv] in, out [T, nv, dv].
// decay [nv] is -exp(A_log).
void qwenrun_cpu_delta_net(const float *qkv, const float *z, const float *b, const float *a, const float *conv_weight,
                           float *conv_state, const float *decay, const float *dt_bias, const float *norm, float eps,
                           float *state, int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv,
                           int64_t taps, float *out) {
    const int64_t keys = key_heads * dk, channels = 2 * keys + value_heads * dv, many = tokens * value_heads;
    float *mixed = scratch<float>(MIXED_PART, tokens * channels + 2 * many + many * dv), *beta = mixed + tokens * channels;
    float *g = beta + many, *read = g + many;
    qwenrun_cpu_conv(qkv, conv_weight, conv_state, tokens, channels, taps, mixed);
    for (int64_t i = 0; i < many; ++i) {
        beta[i] = 1.0f / (1.0f + exp_float(-b[i]));
        const float x = a[i] + dt_bias[i % value_heads];
        // log(1 + e^x) without overflow; beyond 20 it is x.
        g[i] = decay[i % value_heads] * (x > 20.0f ? x : std::log1p(exp_float(x)));
    }
    qwenrun_cpu_delta_rule(mixed, mixed + keys, mixed + 2 * keys, g, beta, state, tokens, key_heads, value_heads, dk, dv,
                           channels, channels, channels, read);
    qwenrun_cpu_gated_rms_norm(read, norm, z, eps, many, dv, out);
}

// Attention of queries q [T, Hq, D] over S cached keys and values [S, Hkv, D], causal, the last query sees all. D is a
// multiple of 8. kind 0: float32, 1: bf16, 2: int8 with half float scales [S, Hkv]. Few queries share the cache's
// runs out among the threads, many are themselves shared out: the arithmetic of a query is the same.
void qwenrun_cpu_attention(const float *q, const void *k, const void *v, const uint16_t *k_scales,
                           const uint16_t *v_scales, int32_t kind, int64_t tokens, int64_t length, int64_t heads,
                           int64_t groups, int64_t size, float scale, float *out) {
    const Cache cache = {k, v, k_scales, v_scales, kind, groups, size};
    const int64_t shared = heads / groups, entry = size + MIXED;
    auto block = [&](int64_t group, int64_t t, int64_t count) {
        return Queries{q + (t * heads + group * shared) * size, size, heads * size, shared, count, length - tokens + t, scale};
    };
    auto result = [&](int64_t group, int64_t t) { return out + (t * heads + group * shared) * size; };
    if (tokens <= TOGETHER) {
        const int64_t runs = (length + KEYS - 1) / KEYS, many = shared * tokens;
        float *parts = scratch<float>(KEYS_PART, groups * runs * many * entry);
        each(runs * groups, KEYS * size, [&](int64_t task) {
            const int64_t group = task / runs, run = task % runs;
            attend_run(cache, block(group, 0, tokens), group, run, length, parts + task * many * entry);
        });
        for (int64_t group = 0; group < groups; ++group)
            merge_runs(block(group, 0, tokens), runs, size, parts + group * runs * many * entry, result(group, 0));
        return;
    }
    const int64_t chunks = (tokens + TOGETHER - 1) / TOGETHER;
    Pool::get().each(chunks * groups, [&](int64_t task) {
        const int64_t group = task % groups, t = task / groups * TOGETHER;
        const int64_t count = tokens - t < TOGETHER ? tokens - t : TOGETHER;
        const Queries queries = block(group, t, count);
        const int64_t seen = queries.first + count, runs = (seen + KEYS - 1) / KEYS, many = shared * count;
        float *parts = scratch<float>(KEYS_PART, runs * many * entry);
        for (int64_t run = 0; run < runs; ++run)
            attend_run(cache, queries, group, run, seen, parts + run * many * entry);
        merge_runs(queries, runs, size, parts, result(group, t));
    });
}

// The top k of softmax(logits [T, E]), renormalised to sum 1; of equals the first.
void qwenrun_cpu_top_k(const float *logits, int64_t tokens, int64_t count, int64_t k, int64_t *index, float *weight) {
    each(tokens, 8 * count, [&](int64_t t) {
        float *x = scratch<float>(MIXED_PART, count);
        std::memcpy(x, logits + t * count, count * sizeof(float));
        int64_t *chosen = index + t * k;
        float *w = weight + t * k, total = 0.0f, bad = 0.0f;
        for (int64_t e = 0; e < count; ++e) bad += x[e] * 0.0f;
        for (int64_t j = 0; j < k; ++j) {
            int64_t best = 0;
            for (int64_t e = 1; e < count; ++e) best = x[e] > x[best] ? e : best;
            chosen[j] = best;
            w[j] = exp_float(x[best] - logits[t * count + chosen[0]]);
            x[best] = -__builtin_inff();
            total += w[j];
        }
        for (int64_t j = 0; j < k; ++j) w[j] = w[j] / total + bad;
    });
}
}
#if defined(__clang__) && defined(__x86_64__)
#pragma clang attribute pop
#endif
