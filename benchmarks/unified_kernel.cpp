// Kernels for weights in blocks that share one absolute value u, and the same work with float32 weights; one thread.
//
// A "chunk" is 32 input channels, a "vec" L filters, a block A filters x B channels. In a vec, lane l is filter
// (l % n) * A + l / n with n = L / A blocks: n values of u, repeated, are a scale for all lanes.

#include <immintrin.h>

#include <cstdint>

#define INLINE inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 32") for (int i = 0; i < (n); i++)

#ifdef __AVX512F__
constexpr int L = 16;
typedef uint16_t bits_t;  // a bit of every lane
#else
constexpr int L = 8;
typedef uint8_t bits_t;
#endif
typedef float vec __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint32_t ints __attribute__((vector_size(4 * L), aligned(4), may_alias));

INLINE vec splat(float x) { return x - vec{}; }
INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
INLINE void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
INLINE float sum(vec v, int from, int to) {
    float total = 0;
    for (int l = from; l < to; l++) total += v[l];
    return total;
}

#ifdef __AVX512F__
INLINE vec fours(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
INLINE vec repeat(const float* p) { return fours(p); }  // the u of L / 4 blocks
INLINE vec look(vec table, ints word) { return _mm512_permutexvar_ps((__m512i)word, table); }  // of its low 4 bits
INLINE vec signed_scale(vec u, ints) { return u; }
INLINE vec negate(vec v, uint32_t signs, int lane0) {  // where bits lane0, lane0 + 1, ... are set
    return (vec)_mm512_mask_xor_epi32((__m512i)v, signs >> lane0, (__m512i)v, _mm512_set1_epi32(INT32_MIN));
}
INLINE vec add_signed(vec sum, vec x, bits_t bits, vec) { return _mm512_mask_add_ps(sum, bits, sum, x); }
#else
INLINE vec fours(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
INLINE vec repeat(const float* p) { return (vec)_mm256_broadcast_sd(reinterpret_cast<const double*>(p)); }
INLINE vec look(vec table, ints word) { return _mm256_permutevar8x32_ps(table, (__m256i)word); }  // of its low 3 bits
INLINE vec flip(vec v, ints sign) { return (vec)((ints)v ^ (sign & 0x80000000u)); }
INLINE vec signed_scale(vec u, ints word) { return flip(u, word << 28); }  // the 4th bit: all four signs turned
INLINE vec negate(vec v, uint32_t signs, int lane0) {
    return flip(v, (signs - ints{}) << (uint32_t(31 - lane0) - ints{0, 1, 2, 3, 4, 5, 6, 7}));
}
INLINE vec add_signed(vec sum, vec x, bits_t, vec sign) { return sum + x * sign; }  // no masks; as cheap as an addition
#endif

template <int A> constexpr int BLOCKS = A < L ? L / A : 1;  // of a vec
template <int A> INLINE vec scale(const float* u) { return A == 1 ? load(u) : A < L ? repeat(u) : splat(*u); }

// Weights of a vec and a chunk, for a convolution at one position of its kernel.
struct Floats { float w[32][L]; };
template <int A, int B> struct Signs { bits_t bits[32]; float u[32 / B][BLOCKS<A>]; };
template <int A> struct Looks { uint32_t words[L]; float u[8][BLOCKS<A>]; };  // a word: 8 numbers of 4 signs
struct Block { float u; uint32_t place; };  // 4 x 4 at channel 4 * (lower half of place), the upper half are signs

// What each 4 channels add up to with each choice of signs; with L = 8 the last is always added.
INLINE void tables(const float* x, float* out, int64_t pixels) {
    vec sign[4];
    for (int c = 0; c < 4; c++)
        for (int l = 0; l < L; l++) sign[c][l] = l >> c & 1 ? -1.0f : 1.0f;
    for (int64_t i = 0; i < pixels * 8; i++, x += 4, out += L)
        store(out, (x[0] * sign[0] + x[1] * sign[1]) + (x[2] * sign[2] + x[3] * sign[3]));
}

struct FloatTile {  // F vecs x P pixels: sum of w * x
    static constexpr int F = 2, P = L == 16 ? 14 : 6, INPUT = 32;
    typedef Floats Weights;
    static INLINE const float* prepare(const float* x, float*, int64_t) { return x; }
    static INLINE const Floats* unpack(const Floats* w, Floats*) { return w; }
    static INLINE void add(vec (&sum)[F][P], const float* x, const Floats* w, int64_t next) {
        for (int c = 0; c < 32; c++) EACH(p, P) {
            const vec value = splat(x[p * 32 + c]);
            EACH(f, F) sum[f][p] += load(w[f * next].w[c]) * value;
        }
    }
};

template <int A, int B> struct ExpandTile : FloatTile {  // the same, of floats made once for all pixels
    typedef Signs<A, B> Weights;
    static INLINE const Floats* unpack(const Weights* w, Floats* out) {
        for (int tap = 0; tap < 9; tap++)
            for (int c = 0; c < 32; c++) store(out[tap].w[c], negate(scale<A>(w[tap].u[c / B]), w[tap].bits[c], 0));
        return out;
    }
};

template <int A> struct AddTile {  // sum of u * (+-x0 +-x1 +-x2 +-x3), 4 additions and one fma
    static constexpr int F = 1, P = 14, INPUT = 48;
    typedef Signs<A, 4> Weights;
    static INLINE const Weights* unpack(const Weights* w, Floats*) { return w; }
    static INLINE const float* prepare(const float* x, float* out, int64_t pixels) {  // x, and half of -(x0 + .. + x3)
        for (int64_t i = 0; i < pixels * 8; i++, x += 4) {
            float *own = out + i / 8 * INPUT, *four = own + i % 8 * 4;
            EACH(c, 4) four[c] = x[c];
            own[32 + i % 8] = -0.5f * ((x[0] + x[1]) + (x[2] + x[3]));
        }
        return out;
    }
    static INLINE void add(vec (&sum)[F][P], const float* x, const Weights* w, int64_t) {
        for (int g = 0; g < 8; g++, x += 4) {
            const vec u = scale<A>(w->u[g]) * (L == 16 ? -2.0f : 1.0f);
            vec sign[4];
            EACH(c, 4) sign[c] = negate(splat(1.0f), w->bits[4 * g + c], 0);
            EACH(p, P) {
                const float* own = x + p * INPUT;
                vec part = L == 16 ? splat(own[32 - 3 * g]) : vec{};
                EACH(c, 4) part = add_signed(part, splat(own[c]), w->bits[4 * g + c], sign[c]);
                sum[0][p] += u * part;
            }
        }
    }
};

template <int A> struct LookTile {  // sum of u * (what the table has for the four signs)
    static constexpr int F = L == 16 ? 2 : 1, P = 14, INPUT = 8 * L;
    typedef Looks<A> Weights;
    static INLINE const Weights* unpack(const Weights* w, Floats*) { return w; }
    static INLINE const float* prepare(const float* x, float* out, int64_t n) { return tables(x, out, n), out; }
    static INLINE void add(vec (&sum)[F][P], const float* x, const Weights* w, int64_t next) {
        ints word[F];
        EACH(f, F) word[f] = *reinterpret_cast<const ints*>(w[f * next].words);
        for (int g = 0; g < 8; g++, x += L) EACH(f, F) {
            const vec u = signed_scale(scale<A>(w[f * next].u[g]), word[f]);
            EACH(p, P) sum[f][p] += u * look(load(x + p * INPUT), word[f]);
            word[f] >>= 4;
        }
    }
};

// 3x3: x [chunk][(size + 2)^2][32], y [vec][size^2][L], w [vec][chunk][9].
template <class T>
INLINE void conv(const float* x, const typename T::Weights* w, float* y, float* work, const int64_t* n) {
    constexpr int F = T::F, P = T::P;
    const int64_t chunks = n[0], vecs = n[1], size = n[2], pitch = size + 2, area = size * size;
    static Floats expanded[F * 9];
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const float* input = T::prepare(x + chunk * pitch * pitch * 32, work, pitch * pitch);
        for (int64_t v = 0; v < vecs; v += F) {
            const auto* own = T::unpack(w + (v * chunks + chunk) * 9, expanded);
            EACH(f, F - 1) T::unpack(w + ((v + f + 1) * chunks + chunk) * 9, expanded + 9 * (f + 1));
            const int64_t next = (const void*)own == expanded ? 9 : chunks * 9;
            for (int64_t p0 = 0; p0 < area; p0 += P) {
                float* to = y + (v * area + p0) * L;
                vec sum[F][P];
                EACH(f, F) EACH(p, P) sum[f][p] = chunk ? load(to + (f * area + p) * L) : vec{};
                const float* from = input + (p0 / size * pitch + p0 % size) * T::INPUT;
                for (int tap = 0; tap < 9; tap++)
                    T::add(sum, from + (tap / 3 * pitch + tap % 3) * T::INPUT, own + tap, next);
                EACH(f, F) EACH(p, P) store(to + (f * area + p) * L, sum[f][p]);
            }
        }
    }
}

#define CONV(NAME, ...) \
    void conv_##NAME(const float* x, const __VA_ARGS__::Weights* w, float* y, float* work, const int64_t* n) { \
        conv<__VA_ARGS__>(x, w, y, work, n); \
    }

extern "C" {
CONV(float, FloatTile)
CONV(add_4x4, AddTile<4>)
CONV(add_1x4, AddTile<1>)
CONV(expand_4x1, ExpandTile<4, 1>)
CONV(expand_16x1, ExpandTile<16, 1>)
CONV(look_4x4, LookTile<4>)
CONV(look_1x4, LookTile<1>)

// y = W x, [rows, columns] of n; columns are a multiple of 32, rows of what the kernel computes at once.
void line_float(const float* x, const float* w, float* y, float*, const int64_t* n) {
    for (int64_t row = 0; row < n[0]; row += 4, w += 4 * n[1]) {
        vec part[4][2] = {};
        for (int64_t c = 0; c < n[1]; c += 2 * L)
            EACH(r, 4) EACH(k, 2) part[r][k] += load(w + r * n[1] + c + k * L) * load(x + c + k * L);
        EACH(r, 4) y[row + r] = sum(part[r][0] + part[r][1], 0, L);
    }
}

void line_look_4x4(const float* x, const Looks<4>* w, float* y, float* work, const int64_t* n) {
    const int64_t chunks = n[1] / 32;
    tables(x, work, chunks);
    for (int64_t row = 0; row < n[0]; row += 4 * L, w += 4 * chunks) {
        vec part[4] = {};
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            ints word[4];
            EACH(f, 4) word[f] = *reinterpret_cast<const ints*>(w[f * chunks + chunk].words);
            EACH(g, 8) EACH(f, 4) {
                const vec u = signed_scale(repeat(w[f * chunks + chunk].u[g]), word[f]);
                part[f] += u * look(load(work + (chunk * 8 + g) * L), word[f]);
                word[f] >>= 4;
            }
        }
        EACH(f, 4) store(y + row + f * L, part[f]);
    }
}

// Rows of 4 x 4 blocks: `counts` of them alike, in w, and of 16 floats, in `free`, whose channels are in `places`.
void line_blocks_4x4(const float* x, const Block* w, float* y, const float* free, const int64_t* n,
                     const uint16_t* places, const int32_t* counts) {
    constexpr int H = 16 / L, K = 4;
    for (int64_t row = 0; row < n[0]; row += 4, counts += 2) {
        vec part[K][H] = {};
        const auto alike = [&](int k) {
            const vec value = fours(x + 4 * (w->place & 0xffff));
            EACH(h, H) part[k][h] += w->u * negate(value, w->place, 16 + h * L);
            w++;
        };
        const auto plain = [&](int k) {
            _mm_prefetch(reinterpret_cast<const char*>(free + 512), _MM_HINT_T0);
            const vec value = fours(x + 4 * *places++);
            EACH(h, H) part[k][h] += load(free + h * L) * value;
            free += 16;
        };
        int i = counts[0], j = counts[1];
        for (; i >= K; i -= K) {
            _mm_prefetch(reinterpret_cast<const char*>(w + 256), _MM_HINT_T0);
            EACH(k, K) alike(k);
        }
        for (; i; i--) alike(0);
        for (; j >= K; j -= K) EACH(k, K) plain(k);
        for (; j; j--) plain(0);
        EACH(k, K - 1) EACH(h, H) part[0][h] += part[k + 1][h];
        EACH(f, 4) y[row + f] = sum(part[0][f * 4 / L], f * 4 % L, f * 4 % L + 4);
    }
}

void evict(const char* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_clflush(data + i);
    _mm_mfence();
}

int64_t cycles(int64_t n) {  // takes n of them: a dependent multiplication takes 3
    int64_t product = n;
    for (; n > 0; n -= 12) asm volatile("imul %0, %0\nimul %0, %0\nimul %0, %0\nimul %0, %0" : "+r"(product));
    return product;
}

int lanes() { return L; }
}
