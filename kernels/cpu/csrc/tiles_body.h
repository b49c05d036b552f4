// Products with tiled matrices, written once for every instruction set: P is the set, N how many rows of activations.
//
// A lane of 32 bits is a row of the matrix, so nothing is ever summed across lanes: 4 activations are broadcast and
// multiplied with 4 codes of each of the 16 rows, a block's products are summed as integers, and one fused
// multiply-add a block applies the 16 rows' scales. Activations lie as they come.
//
// P has: I (16 x 32 bits), F (16 floats), Part (sums of up to SLAB columns), and the functions used below.
// Included inside a translation unit that is compiled for one instruction set; everything is local to it.

template <class P, int N, int KIND, bool ZERO>
static void times_n(const Matrix &w, int64_t first, int64_t last, const Rounded &acts, const int64_t *rows, float *out,
                    int64_t stride) {
    // Products of codes and activations are summed in 16 bits where there is no better: 8 of at most 15 x 127, or 4
    // of at most 24 x 127 a lane.
    constexpr int SLAB = KIND == INT4 ? 32 : 16;
    const int64_t blocks = w.cols / w.block, slabs = w.block / SLAB;
    const int64_t scale_bytes = 16 * (w.scale == F16 ? 2 : 1);
    const int8_t *q[N];
    const float *by[N], *less[N];
    for (int n = 0; n < N; ++n) {
        q[n] = acts.codes + rows[n] * acts.cols;
        by[n] = acts.scales + rows[n] * acts.step;
        less[n] = acts.less + rows[n] * acts.step;
    }
    for (int64_t t = first; t < last; ++t) {
        const uint8_t *p = w.codes + t * w.cols * 8, *s = w.scales + t * blocks * scale_bytes;
        const uint8_t *z = ZERO ? w.zeros + t * blocks * 8 : nullptr;
        typename P::F acc[N];
        for (int n = 0; n < N; ++n) acc[n] = P::zero();
        int64_t k = 0;
        for (int64_t b = 0; b < blocks; ++b, s += scale_bytes) {
            typename P::I sum[N];
            for (int n = 0; n < N; ++n) sum[n] = P::none();
            for (int64_t slab = 0; slab < slabs; ++slab) {
                typename P::Part part[N];
                for (int n = 0; n < N; ++n) part[n] = P::part();
                for (int step = 0; step < SLAB / 8; ++step, p += 64, k += 8) {
                    const typename P::I v = P::load(p);
                    if (N == 1) __builtin_prefetch(p + 1024);
                    const typename P::I lo = P::template low<KIND>(v), hi = P::template high<KIND>(v);
                    for (int n = 0; n < N; ++n) {
                        P::dot(part[n], lo, q[n] + k);
                        P::dot(part[n], hi, q[n] + k + 4);
                    }
                }
                for (int n = 0; n < N; ++n) P::add(sum[n], part[n]);
            }
            const typename P::F scale = w.scale == F16 ? P::f16(s) : w.scale == E4M3 ? P::e4m3(s) : P::e8m0(s);
            if (ZERO) {
                const typename P::F zero = P::nibbles(z + 8 * b);
                for (int n = 0; n < N; ++n)
                    acc[n] = P::fma(P::times_less(sum[n], by[n] + b, zero, less[n] + b), scale, acc[n]);
            } else {
                for (int n = 0; n < N; ++n) acc[n] = P::fma(P::times_less(sum[n], by[n] + b, less[n] + b), scale, acc[n]);
            }
        }
        for (int n = 0; n < N; ++n) P::store(out + n * stride + 16 * (t - first), acc[n]);
    }
}

template <class P, int KIND, bool ZERO>
static void times_kind(const Matrix &w, int64_t first, int64_t last, const Rounded &acts, const int64_t *rows,
                       int64_t count, float *out, int64_t stride) {
    // One tile at a time for all rows: it stays in the first cache while they pass.
    if (count == 1) return times_n<P, 1, KIND, ZERO>(w, first, last, acts, rows, out, stride);
    for (int64_t t = first; t < last; ++t, out += 16) {
        int64_t n = 0;
        for (; n + 4 <= count; n += 4)
            times_n<P, 4, KIND, ZERO>(w, t, t + 1, acts, rows + n, out + n * stride, stride);
        if (n + 2 <= count) {
            times_n<P, 2, KIND, ZERO>(w, t, t + 1, acts, rows + n, out + n * stride, stride);
            n += 2;
        }
        if (n < count) times_n<P, 1, KIND, ZERO>(w, t, t + 1, acts, rows + n, out + n * stride, stride);
    }
}

template <class P>
static void times(const Matrix &w, int64_t first, int64_t last, const Rounded &acts, const int64_t *rows, int64_t count,
                  float *out, int64_t stride) {
    if (w.kind == E2M1) times_kind<P, E2M1, false>(w, first, last, acts, rows, count, out, stride);
    else if (w.zeros) times_kind<P, INT4, true>(w, first, last, acts, rows, count, out, stride);
    else times_kind<P, INT4, false>(w, first, last, acts, rows, count, out, stride);
}

// Codes are the nearest integers (ties to even) of x / scale, scale the block's largest magnitude / 127.
static void round_row(const Matrix &w, const float *x, int8_t *codes, float *scales, float *less) {
    // E2M1 codes are stored doubled, and an E4M3 scale is read as a half float, 2^8 too small.
    const float gain = (w.kind == E2M1 ? 0.5f : 1.0f) * (w.scale == E4M3 ? 256.0f : 1.0f);
    const float offset = w.kind == E2M1 ? 12.0f : w.zeros ? 1.0f : 8.0f;
    for (int64_t b = 0; b < w.cols / w.block; ++b) {
        const float *v = x + b * w.block;
        v8 most = {}, probe = {};
        for (int64_t i = 0; i < w.block; i += 8) {
            const v8 a = load8(v + i), size = a < 0.0f ? -a : a;
            most = size > most ? size : most;
            probe += a * 0.0f;
        }
        float largest = 0.0f;
        for (int i = 0; i < 8; ++i) largest = most[i] > largest ? most[i] : largest;
        // A maximum would hide what is not a number; the sum of zeros does not.
        const float scale = largest / 127.0f + sum8(probe);
        float inverse = 1.0f / scale;
        inverse = scale > 0.0f && inverse <= 3.4e38f ? inverse : 0.0f;
        // Adding and taking off 1.5 x 2^23 rounds to an integer.
        const v8 by = all8(inverse), magic = all8(12582912.0f);
        i8 sum = {};
        for (int64_t i = 0; i < w.block; i += 8) {
            const v8 shifted = load8(v + i) * by + magic;
            i8 code = (i8)shifted - (i8)magic;
            code = inverse > 0.0f ? code : i8{};
            sum += code;
            for (int j = 0; j < 8; ++j) codes[b * w.block + i + j] = static_cast<int8_t>(code[j]);
        }
        int32_t total = 0;
        for (int i = 0; i < 8; ++i) total += sum[i];
        scales[b] = scale * gain;
        less[b] = scale * gain * static_cast<float>(total) * offset;
    }
}

static void silu_times(float *gate, const float *up, int64_t count) {
    by_eights(count, [&](int64_t i, int64_t lanes) {
        store_some(gate + i, silu8(load_some(gate + i, lanes)) * load_some(up + i, lanes), lanes);
    });
}
