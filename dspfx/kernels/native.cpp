// Runs a program of layers on planes of floats, one image after another: what dspfx/kernels/program.py writes.
//
// A plane is one channel of one image: rows of `pitch` floats, the pixels first and zeros behind them, which are the
// right border of one row and the left border of the next. A convolution of stride 1 is then the same sum at every
// position p of a plane, borders included,
//
//     out[p] = sum over k of weight[k] * in[offset[k] + p],
//
// in which an offset is a channel's plane and a shift inside it. So a filter's input channels are a list of offsets,
// whatever its kernel, dilation, or group, and nothing is gathered or scattered. Strides are dealt with before, by
// copies that split a plane into its phases. Sums at positions behind a row's pixels mean nothing and are replaced by
// zeros through a mask.
//
// No header of torch or Python: a C ABI, called with raw pointers.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = sizeof(void*) == 8 ? 16 : 8;
#endif

constexpr int MAX_FILTERS = REGISTERS == 32 ? 12 : 6;  // of a tile
constexpr int MAX_VECTORS = 8;

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

namespace {

// Vectors of positions that a tile of F filters computes at once: accumulators, inputs and one weight stay in registers.
constexpr int vectors_of(int filters) {
    int fit = (REGISTERS - 1) / (filters + 1);
    return fit < 1 ? 1 : fit > MAX_VECTORS ? MAX_VECTORS : fit;
}

enum Op : int32_t { CONV = 1, COPY = 2, MAP = 3, POOL = 4, MEAN = 5, LINEAR = 6, SCALE = 7 };
enum Activation : int32_t { NONE = 0, RELU = 1, RELU6 = 2, HARDSWISH = 3, SILU = 4, SIGMOID = 5, HARDSIGMOID = 6 };
enum Space : int32_t { WORK = 0, INPUT = 1, OUTPUT = 2 };  // INPUT + 2 i and OUTPUT + 2 i for the i-th

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }

inline vec splat(float x) { return x - vec{}; }  // x + 0 would have to make +0 of -0

inline vec clip(vec x, float low, float high) {  // NaN stays NaN
    x = x < splat(low) ? splat(low) : x;
    return x > splat(high) ? splat(high) : x;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2; n is rounded by adding 1.5 * 2^23, in whose last bits it then stands.
inline vec exponential(vec x) {
    x = clip(x, -87.0f, 88.0f);
    const vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * reinterpret_cast<vec>((reinterpret_cast<mask_t>(shifted) + 127) << 23);
}

inline vec activate(vec y, int32_t kind) {
    switch (kind) {
        case RELU: return y < vec{} ? vec{} : y;
        case RELU6: return clip(y, 0.0f, 6.0f);
        case HARDSWISH: return y * (clip(y + 3.0f, 0.0f, 6.0f) / 6.0f);
        case SILU: y = y < splat(-100.0f) ? splat(-100.0f) : y; return y / (exponential(-y) + 1.0f);
        case SIGMOID: return 1.0f / (exponential(-y) + 1.0f);
        case HARDSIGMOID: return clip(y + 3.0f, 0.0f, 6.0f) / 6.0f;
        default: return y;
    }
}

inline void store(float* out, vec y, const int32_t* mask) {
    *reinterpret_cast<mask_t*>(out) = reinterpret_cast<mask_t>(y) & *reinterpret_cast<const mask_t*>(mask);
}

struct Context {
    const int32_t* program;       // steps and what they refer to by place
    const int32_t* first;         // step
    const float* weights;
    float* work;
    const float* const* inputs;
    float* const* outputs;
    const int64_t* input_sizes;   // floats of one image
    const int64_t* output_sizes;
    int64_t image;

    float* at(int32_t space, int32_t offset) const {
        if (space == WORK) return work + offset;
        const int32_t i = (space - 1) / 2;
        if ((space - 1) % 2 == 0) return const_cast<float*>(inputs[i]) + image * input_sizes[i] + offset;
        return outputs[i] + image * output_sizes[i] + offset;
    }
};

// ---------------------------------------------------------------------------------------------------- convolution

struct ConvStep {
    int32_t op, size, positions, block, by_block, activation, mask, has_residual, is_far, tiles;
    // then the place of each tile
};

struct ConvTile {
    int32_t filters, terms, offsets, weights, bias;  // then planes of the outputs, then of the residuals

    const int32_t* outputs() const { return &bias + 1; }
    const int32_t* residuals() const { return outputs() + filters; }
};

typedef void (*TileKernel)(const Context&, const ConvStep&, const ConvTile&, int64_t);

// Residual, activation and mask. Those of nearly every network stay in registers.
template <int F, int V, bool ADDS, bool CLIPS>
inline __attribute__((always_inline)) void finish(const Context& c, const ConvStep& step, const ConvTile& tile,
                                                  int64_t position, const vec (&sum)[F][V]) {
    const int32_t *mask = c.program + step.mask + position, *to = tile.outputs(), *add = tile.residuals();
#pragma GCC unroll 16
    for (int f = 0; f < F; f++) {
        float* out = c.work + position + to[f];
        const float* residual = c.work + position + (ADDS ? add[f] : 0);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            vec y = sum[f][v];
            if (ADDS) y += load(residual + v * LANES);
            store(out + v * LANES, CLIPS ? activate(y, RELU) : y, mask + v * LANES);
        }
    }
}

__attribute__((noinline)) void finish_any(const Context& c, const ConvStep& step, const ConvTile& tile,
                                          int64_t position, const vec* sum, int vectors) {
    for (int f = 0; f < tile.filters; f++)
        for (int v = 0; v < vectors; v++) {
            const int64_t place = position + v * LANES;
            vec y = sum[f * vectors + v];
            if (step.has_residual) y += load(c.work + place + tile.residuals()[f]);
            store(c.work + place + tile.outputs()[f], activate(y, step.activation), c.program + step.mask + place);
        }
}

// FAR: weights and planes do not stay in the second-level cache, and planes lie too far from each other for the
// processor to foresee what is read next: it is told.
template <int F, int V, bool FAR>
void conv_tile(const Context& c, const ConvStep& step, const ConvTile& tile, int64_t position) {
    vec sum[F][V];
    const float* bias = c.weights + tile.bias;
#pragma GCC unroll 16
    for (int f = 0; f < F; f++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sum[f][v] = splat(bias[f]);
    const int32_t* offset = c.program + tile.offsets;
    const float* weight = c.weights + tile.weights;
    const float* base = c.work + position;
    for (int32_t k = 0; k < tile.terms; k++, weight += F) {
        const float* from = base + offset[k];
        if (FAR) {
#pragma GCC unroll 16
            for (int v = 0; v < V; v += 16 / LANES) __builtin_prefetch(from + (V + v) * LANES);
            __builtin_prefetch(weight + 128 * F);
        }
        vec x[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) x[v] = load(from + v * LANES);
#pragma GCC unroll 16
        for (int f = 0; f < F; f++) {
            const vec w = splat(weight[f]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) sum[f][v] += x[v] * w;
        }
    }
    if (step.activation == NONE && !step.has_residual) finish<F, V, false, false>(c, step, tile, position, sum);
    else if (step.activation == NONE) finish<F, V, true, false>(c, step, tile, position, sum);
    else if (step.activation == RELU && !step.has_residual) finish<F, V, false, true>(c, step, tile, position, sum);
    else if (step.activation == RELU) finish<F, V, true, true>(c, step, tile, position, sum);
    else finish_any(c, step, tile, position, &sum[0][0], V);
}

// [F - 1][V - 1][FAR]
struct Kernels {
    TileKernel of[MAX_FILTERS][MAX_VECTORS][2] = {};

    Kernels() { fill<1, 1>(); }

    template <int F, int V>
    void fill() {
        of[F - 1][V - 1][0] = conv_tile<F, V, false>;
        of[F - 1][V - 1][1] = conv_tile<F, V, true>;
        if constexpr (V < vectors_of(F)) fill<F, V + 1>();
        else if constexpr (F < MAX_FILTERS) fill<F + 1, 1>();
    }
};
const Kernels KERNELS;

void conv_item(const Context& c, const ConvStep& step, const ConvTile& tile, int64_t start, int64_t stop) {
    const int64_t vectors = (stop - start + LANES - 1) / LANES, most = vectors_of(tile.filters);
    const int64_t calls = (vectors + most - 1) / most;
    for (int64_t i = 0, done = 0; i < calls; i++) {  // of nearly equal size: a last call of one vector would be slow
        const int64_t now = (vectors - done + calls - i - 1) / (calls - i);
        KERNELS.of[tile.filters - 1][now - 1][step.is_far](c, step, tile, start + done * LANES);
        done += now;
    }
}

// ------------------------------------------------------------------------------------------------- everything else

struct CopyStep {  // rows of one plane to rows of another, columns `step` apart
    int32_t op, size, source, target, rows, columns, row_step, column_step, pitch, count;  // then pairs of planes
};

void copy_item(const Context& c, const CopyStep& s, int64_t i) {
    const int32_t* planes = &s.count + 1 + 2 * i;
    const float* from = c.at(s.source, planes[0]);
    float* to = c.at(s.target, planes[1]);
    for (int32_t y = 0; y < s.rows; y++, from += s.row_step, to += s.pitch) {
        if (s.column_step == 1)
            std::memcpy(to, from, sizeof(float) * s.columns);
        else if (s.column_step == 2)
            for (int32_t x = 0; x < s.columns; x++) to[x] = from[2 * x];
        else
            for (int32_t x = 0; x < s.columns; x++) to[x] = from[(int64_t)s.column_step * x];
    }
}

struct MapStep {  // activation(scale * a + shift + b), plane by plane
    int32_t op, size, positions, activation, mask, has_second, count;  // then a, b, out, the place of (scale, shift)
};

void map_item(const Context& c, const MapStep& s, int64_t i) {
    const int32_t* p = &s.count + 1 + 4 * i;
    const float *a = c.work + p[0], *b = c.work + p[1], scale = c.weights[p[3]], shift = c.weights[p[3] + 1];
    float* out = c.work + p[2];
    const int32_t* mask = c.program + s.mask;
    for (int32_t x = 0; x < s.positions; x += LANES) {
        vec y = load(a + x) * scale + shift;
        if (s.has_second) y += load(b + x);
        store(out + x, activate(y, s.activation), mask + x);
    }
}

struct ScaleStep {  // planes times a number each
    int32_t op, size, positions, mask, count;  // then plane, place of the number, plane of the result
};

void scale_item(const Context& c, const ScaleStep& s, int64_t i) {
    const int32_t *p = &s.count + 1 + 3 * i, *mask = c.program + s.mask;
    const float factor = c.work[p[1]];
    for (int32_t x = 0; x < s.positions; x += LANES) store(c.work + p[2] + x, load(c.work + p[0] + x) * factor, mask + x);
}

struct PoolStep {  // the largest, or the mean, of a window
    int32_t op, size, is_max, rows, columns, pitch, out_rows, out_columns, out_pitch, kernel_y, kernel_x, stride_y,
        stride_x, pad_y, pad_x, counts_pad, scratch, scratch_size, count;  // then pairs of planes
};

inline int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

inline void reduce(float* to, const float* from, int32_t count, bool is_max) {  // reaches behind `count`
    for (int32_t x = 0; x < count; x += LANES) {
        const vec a = load(to + x), b = load(from + x);
        *reinterpret_cast<vec*>(to + x) = is_max ? ((a > b) | (a != a) ? a : b) : a + b;
    }
}

// Row by row: the rows of a window are reduced to one, with its borders; then that one's phases, shifted.
void pool_item(const Context& c, const PoolStep& s, int64_t i) {
    const int32_t* planes = &s.count + 1 + 2 * i;
    const float* in = c.work + planes[0];
    float* row = c.work + s.scratch + i * s.scratch_size;
    const int32_t width = most(s.columns + 2 * s.pad_x, (s.out_columns - 1) * s.stride_x + s.kernel_x), part = s.out_columns + s.kernel_x / s.stride_x + 2 * LANES;
    float *phases = row + width + 2 * LANES, *sums = phases + s.stride_x * part;
    for (int32_t y = 0; y < s.out_rows; y++) {
        const int32_t top = y * s.stride_y - s.pad_y;
        const int32_t first = most(top, 0), last = least(top + s.kernel_y, s.rows);
        std::memcpy(row + s.pad_x, in + (int64_t)first * s.pitch, sizeof(float) * s.columns);
        for (int32_t r = first + 1; r < last; r++) reduce(row + s.pad_x, in + (int64_t)r * s.pitch, s.columns, s.is_max);
        const float nothing = s.is_max ? -INFINITY : 0.0f;
        for (int32_t x = 0; x < s.pad_x; x++) row[x] = nothing;
        for (int32_t x = s.pad_x + s.columns; x < width; x++) row[x] = nothing;
        for (int32_t j = 0; j < s.stride_x; j++) {
            const int32_t held = (width - j + s.stride_x - 1) / s.stride_x, wanted = least(held, part - LANES);
            float* phase = phases + j * part;
            if (s.stride_x == 1) std::memcpy(phase, row, sizeof(float) * wanted);
            else if (s.stride_x == 2) for (int32_t x = 0; x < wanted; x++) phase[x] = row[2 * x + j];
            else for (int32_t x = 0; x < wanted; x++) phase[x] = row[s.stride_x * x + j];
        }
        std::memcpy(sums, phases, sizeof(float) * s.out_columns);
        for (int32_t k = 1; k < s.kernel_x; k++)
            reduce(sums, phases + k % s.stride_x * part + k / s.stride_x, s.out_columns, s.is_max);
        float* out = c.work + planes[1] + (int64_t)y * s.out_pitch;
        std::memcpy(out, sums, sizeof(float) * s.out_columns);
        if (s.is_max) continue;
        const int32_t high = s.counts_pad ? least(top + s.kernel_y, s.rows + s.pad_y) - top : last - first;
        for (int32_t x = 0; x < s.out_columns; x++) {
            const int32_t left = x * s.stride_x - s.pad_x;
            const int32_t wide = s.counts_pad ? least(left + s.kernel_x, s.columns + s.pad_x) - left
                                              : least(left + s.kernel_x, s.columns) - most(left, 0);
            out[x] /= high * wide;
        }
    }
}

struct MeanStep {  // of whole planes, into one float each
    int32_t op, size, positions, pixels, count;  // then pairs of a plane and a place
};

void mean_item(const Context& c, const MeanStep& s, int64_t i) {
    const int32_t* p = &s.count + 1 + 2 * i;
    const float* in = c.work + p[0];
    float sum = 0;
    int32_t x = 0;
    vec sums = {};
    for (; x + LANES <= s.positions; x += LANES) sums += load(in + x);  // what stands behind a row is zero
    for (int l = 0; l < LANES; l++) sum += sums[l];
    for (; x < s.positions; x++) sum += in[x];
    c.work[p[1]] = sum / s.pixels;
}

struct LinearStep {
    int32_t op, size, features, filters, source, weights, bias, activation, target;
};

constexpr int ROWS = 4;  // filters of an item: as many streams of weights

void linear_item(const Context& c, const LinearStep& s, int64_t item) {
    const int32_t first = item * ROWS, rows = least(s.filters - first, ROWS);
    const float *x = c.work + s.source, *w[ROWS];
    for (int r = 0; r < ROWS; r++) w[r] = c.weights + s.weights + (int64_t)(first + least(r, rows - 1)) * s.features;
    vec sums[ROWS][2] = {};
    float rest[ROWS] = {};
    int32_t i = 0;
    for (; i + 2 * LANES <= s.features; i += 2 * LANES)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            __builtin_prefetch(w[r] + i + 256);
            sums[r][0] += load(x + i) * load(w[r] + i);
            sums[r][1] += load(x + i + LANES) * load(w[r] + i + LANES);
        }
    for (; i < s.features; i++)
        for (int r = 0; r < ROWS; r++) rest[r] += x[i] * w[r][i];
    for (int r = 0; r < rows; r++) {
        const vec all = sums[r][0] + sums[r][1];
        float sum = rest[r] + c.weights[s.bias + first + r];
        for (int l = 0; l < LANES; l++) sum += all[l];
        c.work[s.target + first + r] = activate(splat(sum), s.activation)[0];
    }
}

// ------------------------------------------------------------------------------------------------ items and threads

struct Share {  // of a step: the positions of an item, all items, and how many a thread takes at once
    int64_t block, items, taken;
};

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A convolution's items are a block of positions by a tile of filters, block after block. Where what it reads is more
// than its weights, a thread takes whole blocks, or every core would have to fetch all of it.
Share share_of(const ConvStep& s, int threads) {
    if (threads == 1) return {s.block, up(s.positions, s.block) / s.block * s.tiles, 1};
    int64_t blocks = up(s.positions, s.block) / s.block;
    if (s.by_block) blocks = up(blocks > 2 * threads ? blocks : 2 * threads, threads);
    else while (blocks * s.tiles < 4 * threads) blocks *= 2;
    int64_t block = up(up(s.positions, blocks) / blocks, LANES);
    if (block < 8 * LANES) block = 8 * LANES;
    blocks = up(s.positions, block) / block;
    const int64_t items = blocks * s.tiles;
    return {block, items, s.by_block && blocks >= threads ? s.tiles : items / (64 * threads) + 1};
}

Share share_of(const int32_t* step, int threads) {
    int64_t items;
    switch (step[0]) {
        case CONV: return share_of(*reinterpret_cast<const ConvStep*>(step), threads);
        case COPY: items = reinterpret_cast<const CopyStep*>(step)->count; break;
        case MAP: items = reinterpret_cast<const MapStep*>(step)->count; break;
        case POOL: items = reinterpret_cast<const PoolStep*>(step)->count; break;
        case MEAN: items = reinterpret_cast<const MeanStep*>(step)->count; break;
        case SCALE: items = reinterpret_cast<const ScaleStep*>(step)->count; break;
        default: items = (reinterpret_cast<const LinearStep*>(step)->filters + ROWS - 1) / ROWS;
    }
    return {0, items, items / (16 * threads) + 1};
}

void run_items(const Context& c, const int32_t* step, int64_t block, int64_t first, int64_t last) {
    switch (step[0]) {
        case CONV: {
            const ConvStep& s = *reinterpret_cast<const ConvStep*>(step);
            const int32_t* places = &s.tiles + 1;
            for (int64_t i = first; i < last; i++) {
                const int64_t start = i / s.tiles * block;
                const ConvTile& tile = *reinterpret_cast<const ConvTile*>(c.program + places[i % s.tiles]);
                conv_item(c, s, tile, start, start + block < s.positions ? start + block : s.positions);
            }
            break;
        }
        case COPY:
            for (int64_t i = first; i < last; i++) copy_item(c, *reinterpret_cast<const CopyStep*>(step), i);
            break;
        case MAP:
            for (int64_t i = first; i < last; i++) map_item(c, *reinterpret_cast<const MapStep*>(step), i);
            break;
        case POOL:
            for (int64_t i = first; i < last; i++) pool_item(c, *reinterpret_cast<const PoolStep*>(step), i);
            break;
        case MEAN:
            for (int64_t i = first; i < last; i++) mean_item(c, *reinterpret_cast<const MeanStep*>(step), i);
            break;
        case SCALE:
            for (int64_t i = first; i < last; i++) scale_item(c, *reinterpret_cast<const ScaleStep*>(step), i);
            break;
        default:
            for (int64_t i = first; i < last; i++) linear_item(c, *reinterpret_cast<const LinearStep*>(step), i);
    }
}

// ------------------------------------------------------------------------------------------- programs of strangers

// Whether whatever a program reads and writes is where it may: a file that holds one can come from anywhere.
struct Check {
    const int32_t* program;
    int64_t length, weights, floats;
    const int64_t *input_sizes, *output_sizes;
    int64_t inputs, outputs;

    static bool within(int64_t first, int64_t count, int64_t size) {
        return first >= 0 && count >= 0 && first <= size && count <= size - first;
    }
    static bool apart(int64_t a, int64_t count_a, int64_t b, int64_t count_b) {
        return a + count_a <= b || b + count_b <= a;
    }
    bool work(int64_t first, int64_t count) const { return within(first, count, floats); }
    bool listed(int64_t first, int64_t count) const { return within(first, count, length); }
    bool weight(int64_t first, int64_t count) const { return within(first, count, weights); }
    static bool is_activation(int32_t kind) { return kind >= NONE && kind <= HARDSIGMOID; }

    bool space(int32_t space, int64_t first, int64_t count, bool is_written) const {
        if (space == WORK) return work(first, count);
        const int64_t i = (space - 1) / 2;
        if (space < 1 || ((space - 1) % 2 == 1) != is_written || i >= (is_written ? outputs : inputs)) return false;
        return within(first, count, (is_written ? output_sizes : input_sizes)[i]);
    }

    bool all(int64_t first) const {
        for (int64_t at = first;; at += program[at + 1]) {
            if (!listed(at, 2)) return false;
            if (!program[at]) return true;
            if (program[at + 1] < 2 || !listed(at, program[at + 1]) || !step(program + at, program[at + 1])) return false;
        }
    }

    template <typename Step>
    static const Step* as(const int32_t* step, int64_t size, int32_t Step::*count, int64_t each) {
        if (size < (int64_t)(sizeof(Step) / sizeof(int32_t))) return nullptr;
        const Step* s = reinterpret_cast<const Step*>(step);
        return s->*count >= 0 && (int64_t)(sizeof(Step) / sizeof(int32_t)) + each * (s->*count) <= size ? s : nullptr;
    }

    bool step(const int32_t* step, int64_t size) const {
        switch (step[0]) {
            case CONV: return conv(as(step, size, &ConvStep::tiles, 1));
            case COPY: return copy(as(step, size, &CopyStep::count, 2));
            case MAP: return map(as(step, size, &MapStep::count, 4));
            case POOL: return pool(as(step, size, &PoolStep::count, 2));
            case MEAN: return mean(as(step, size, &MeanStep::count, 2));
            case SCALE: return scale(as(step, size, &ScaleStep::count, 3));
            case LINEAR: return linear(as(step, size, &LinearStep::filters, 0));
            default: return false;
        }
    }

    bool conv(const ConvStep* s) const {
        if (!s || s->positions < 1 || s->block < LANES || s->block % LANES || !is_activation(s->activation)) return false;
        const int64_t reach = up(s->positions, LANES);
        if (s->is_far < 0 || s->is_far > 1 || !listed(s->mask, reach)) return false;
        const int32_t* places = &s->tiles + 1;
        for (int32_t i = 0; i < s->tiles; i++) {
            if (!listed(places[i], sizeof(ConvTile) / sizeof(int32_t))) return false;
            const ConvTile& t = *reinterpret_cast<const ConvTile*>(program + places[i]);
            if (t.filters < 1 || t.filters > MAX_FILTERS || t.terms < 0 || !listed(t.offsets, t.terms)) return false;
            if (!listed(places[i] + sizeof(ConvTile) / sizeof(int32_t), 2 * t.filters)) return false;
            if (!weight(t.weights, (int64_t)t.filters * t.terms) || !weight(t.bias, t.filters)) return false;
            for (int32_t k = 0; k < t.terms; k++)
                if (!work(program[t.offsets + k], reach)) return false;
            for (int32_t f = 0; f < t.filters; f++)
                if (!work(t.outputs()[f], reach) || !work(t.residuals()[f], reach)) return false;
        }
        return true;
    }

    bool copy(const CopyStep* s) const {
        if (!s || s->rows < 1 || s->columns < 1 || s->row_step < 0 || s->column_step < 1 || s->pitch < 0) return false;
        const int64_t read = (int64_t)(s->rows - 1) * s->row_step + (int64_t)(s->columns - 1) * s->column_step + 1;
        const int64_t written = (int64_t)(s->rows - 1) * s->pitch + s->columns;
        for (int32_t i = 0; i < s->count; i++) {
            const int32_t* planes = &s->count + 1 + 2 * i;
            if (!space(s->source, planes[0], read, false) || !space(s->target, planes[1], written, true)) return false;
            if (s->source == s->target && !apart(planes[0], read, planes[1], written)) return false;
        }
        return true;
    }

    bool map(const MapStep* s) const {
        if (!s || s->positions < 1 || !is_activation(s->activation)) return false;
        const int64_t reach = up(s->positions, LANES);
        for (int32_t i = 0; i < s->count; i++) {
            const int32_t* p = &s->count + 1 + 4 * i;
            if (!work(p[0], reach) || !work(p[1], reach) || !work(p[2], reach) || !weight(p[3], 2)) return false;
        }
        return listed(s->mask, reach);
    }

    bool pool(const PoolStep* s) const {
        constexpr int32_t MOST = 1 << 20;  // of a size: products of two fit into 64 bits
        for (int32_t size : {s ? s->rows : 0, s ? s->columns : 0, s ? s->out_rows : 0, s ? s->out_columns : 0,
                             s ? s->kernel_y : 0, s ? s->kernel_x : 0, s ? s->stride_y : 0, s ? s->stride_x : 0})
            if (size < 1 || size > MOST) return false;
        // Every window has to touch the image.
        if (s->pad_y < 0 || s->pad_x < 0 || s->pad_y >= s->kernel_y || s->pad_x >= s->kernel_x) return false;
        if ((int64_t)(s->out_rows - 1) * s->stride_y - s->pad_y >= s->rows) return false;
        if (s->pitch < s->columns || s->out_pitch < 1) return false;
        const int64_t across = (int64_t)(s->out_columns - 1) * s->stride_x;
        const int64_t inside = s->columns + 2 * (int64_t)s->pad_x, reach = across + s->kernel_x;
        const int64_t part = s->out_columns + s->kernel_x / s->stride_x + 2 * LANES;
        const int64_t need = (inside > reach ? inside : reach) + 2 * LANES + (s->stride_x + 1) * part;
        const int64_t scratch = (int64_t)s->scratch_size * s->count;
        if (s->scratch_size < need || !work(s->scratch, scratch)) return false;
        for (int32_t i = 0; i < s->count; i++) {
            const int32_t* planes = &s->count + 1 + 2 * i;
            const int64_t read = (int64_t)(s->rows - 1) * s->pitch + up(s->columns, LANES);
            const int64_t written = (int64_t)(s->out_rows - 1) * s->out_pitch + s->out_columns;
            if (!work(planes[0], read) || !apart(planes[0], read, s->scratch, scratch)) return false;
            if (!work(planes[1], written) || !apart(planes[1], written, s->scratch, scratch)) return false;
        }
        return true;
    }

    bool mean(const MeanStep* s) const {
        if (!s || s->positions < 1 || s->pixels < 1) return false;
        for (int32_t i = 0; i < s->count; i++) {
            const int32_t* p = &s->count + 1 + 2 * i;
            if (!work(p[0], s->positions) || !work(p[1], 1)) return false;
        }
        return true;
    }

    bool scale(const ScaleStep* s) const {
        if (!s || s->positions < 1) return false;
        const int64_t reach = up(s->positions, LANES);
        for (int32_t i = 0; i < s->count; i++) {
            const int32_t* p = &s->count + 1 + 3 * i;
            if (!work(p[0], reach) || !work(p[1], 1) || !work(p[2], reach)) return false;
        }
        return listed(s->mask, reach);
    }

    bool linear(const LinearStep* s) const {
        if (!s || s->features < 1 || s->filters < 1 || !is_activation(s->activation)) return false;
        return work(s->source, s->features) && weight(s->weights, (int64_t)s->features * s->filters) &&
               weight(s->bias, s->filters) && work(s->target, s->filters);
    }
};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// A call. Its steps are done one after another, a step's items by whoever takes them; nobody waits for a thread that
// has taken none, since it may be long in coming on a busy machine.
struct Job {
    Context context;
    std::vector<const int32_t*> steps;
    std::vector<Share> shares;         // of each step
    int64_t last;                      // steps of all images
    std::atomic<uint64_t> ticket{0};   // the step's number above, its first item that is free in the lower half
    std::atomic<int64_t> done{0};      // items of this step

    Job(const Context& c, int64_t images, int threads) : context(c) {
        for (const int32_t* step = c.first; step[0]; step += step[1]) {
            steps.push_back(step);
            shares.push_back(share_of(step, threads));
        }
        last = (int64_t)steps.size() * images;
    }

    void work() {
        Context c = context;
        for (int64_t idle = 0;;) {
            uint64_t now = ticket.load();
            if (number(now) >= last) return;
            const int64_t taken = share(now).taken;
            if (item(now) >= share(now).items) {
                if (++idle < 1 << 12) pause();
                else std::this_thread::yield();
                continue;
            }
            idle = 0;
            now = ticket.fetch_add(taken);  // perhaps of a later step by now
            if (number(now) >= last) return;
            const int64_t all = share(now).items, first = item(now);
            const int64_t behind = first + taken < all ? first + taken : all;
            if (first >= behind) continue;
            c.image = number(now) / (int64_t)steps.size();
            run_items(c, steps[number(now) % (int64_t)steps.size()], share(now).block, first, behind);
            if (done.fetch_add(behind - first) + behind - first < all) continue;
            done = 0;
            ticket = (uint64_t)(number(now) + 1) << 32;
        }
    }

    const Share& share(uint64_t ticket) const { return shares[number(ticket) % (int64_t)steps.size()]; }
    static int64_t number(uint64_t ticket) { return (int64_t)(ticket >> 32); }
    static int64_t item(uint64_t ticket) { return (int64_t)(ticket & 0xffffffff); }
};

void run_alone(Context c, int64_t images) {
    for (c.image = 0; c.image < images; c.image++)
        for (const int32_t* step = c.first; step[0]; step += step[1]) {
            const Share share = share_of(step, 1);
            run_items(c, step, share.block, 0, share.items);
        }
}

// Threads that stay between calls, since starting one takes longer than a small network.
class Team {
  public:
    explicit Team(int helpers) {
        for (int i = 0; i < helpers; i++) std::thread([this] { loop(); }).detach();
    }

    void run(const std::shared_ptr<Job>& job) {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            job_ = job;
            serial_++;
        }
        start_.notify_all();
        job->work();
    }

  private:
    void loop() {
        for (int64_t seen = 0;;) {
            for (int i = 0; i < 1 << 12 && serial_ == seen; i++) pause();  // the next call often comes at once
            std::shared_ptr<Job> job;
            {
                std::unique_lock<std::mutex> hold(mutex_);
                start_.wait(hold, [&] { return serial_ != seen; });
                seen = serial_;
                job = job_;
            }
            job->work();
        }
    }

    std::mutex mutex_;
    std::condition_variable start_;
    std::shared_ptr<Job> job_;
    std::atomic<int64_t> serial_{0};
};

// A team for each number of threads, never freed: they may outlive the interpreter. A forked child has none of them.
Team& team_of(int helpers) {
    static std::mutex mutex;
    static std::vector<std::pair<int, Team*>> teams;
    static int64_t owner = 0;
#if defined(__unix__) || defined(__APPLE__)
    const int64_t self = getpid();
#else
    const int64_t self = 0;
#endif
    std::lock_guard<std::mutex> hold(mutex);
    if (owner != self) teams.clear(), owner = self;
    for (auto& [size, team] : teams)
        if (size == helpers) return *team;
    teams.emplace_back(helpers, new Team(helpers));
    return *teams.back().second;
}

}  // namespace

extern "C" {

int32_t dspfx_lanes() { return LANES; }

int32_t dspfx_max_filters() { return MAX_FILTERS; }

// Whether a program of `length` numbers stays inside of itself, its weights, a workspace of `floats`, and its images.
int32_t dspfx_is_safe(const int32_t* program, int64_t length, int64_t first, int64_t weights, int64_t floats,
                      const int64_t* input_sizes, int64_t inputs, const int64_t* output_sizes, int64_t outputs) {
    return Check{program, length, weights, floats, input_sizes, output_sizes, inputs, outputs}.all(first);
}

void dspfx_run(const int32_t* program, int64_t first, const float* weights, float* work, const float* const* inputs,
               float* const* outputs, const int64_t* input_sizes, const int64_t* output_sizes, int64_t images,
               int32_t threads) {
    const Context context = {program, program + first, weights, work, inputs, outputs, input_sizes, output_sizes, 0};
    if (threads == 1 || !images || !*context.first) return run_alone(context, images);
    team_of(threads - 1).run(std::make_shared<Job>(context, images, threads));
}

// The same on somebody else's threads: parallel(pool, work, count, job) calls work(job, i) for every i below count, on
// however many threads, and returns when all of these calls have.
void dspfx_run_in(const int32_t* program, int64_t first, const float* weights, float* work, const float* const* inputs,
                  float* const* outputs, const int64_t* input_sizes, const int64_t* output_sizes, int64_t images,
                  int32_t threads, void (*parallel)(void* pool, void (*work)(void*, size_t), size_t count, void* job),
                  void* pool) {
    const Context context = {program, program + first, weights, work, inputs, outputs, input_sizes, output_sizes, 0};
    if (threads == 1 || !images || !*context.first) return run_alone(context, images);
    Job job(context, images, threads);
    parallel(pool, [](void* j, size_t) { static_cast<Job*>(j)->work(); }, threads, &job);
}
}
