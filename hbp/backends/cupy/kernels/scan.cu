// Suffix scans of affine maps: g[i] = a[i] g[i+1] + c[i], g[L] = c[L], for channels that do not interact.
//
// A thread owns one channel over one chunk of time and walks it backwards. With a single chunk that is the whole
// solution. With more, `summaries` composes each chunk's maps into one (a product and an offset), the same scan solves
// for the values between chunks, and a scan over all chunks at once starts from those. No thread waits for another.
//
// Inputs are read through strides, in elements: axis 0 is time, the other axes are collapsed into an outer and an
// inner one; null `values` stand for one number, `factor`. Results are contiguous, (time, channel). No header is
// needed, so that any CUDA C++ compiler will do.

#ifdef __CUDACC__
struct float16 {
    unsigned short bits;
};

__device__ inline float widen(float16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

__device__ inline void narrow(float wide, float16 &x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(wide)); }
#endif

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float wide, float &x) { x = wide; }
__device__ inline void narrow(double wide, double &x) { x = wide; }

struct Strides {
    long long time, outer, inner;
};

// The maps v -> a[i] v + c[i] of all channels.
template <typename T, typename A>
struct Maps {
    const T *__restrict__ values;
    const T *__restrict__ offsets;
    A factor;
    Strides value_strides, offset_strides;
    long long length, channels, inner;
};

// One channel's maps, read backwards from map `stop` - 1; without VALUES every a[i] is `factor`.
template <bool VALUES, typename T, typename A>
struct Reader {
    const T *__restrict__ value;
    const T *__restrict__ offset;
    long long value_step, offset_step;
    A factor;

    __device__ Reader(const Maps<T, A> &maps, long long channel, long long stop)
        : value_step(maps.value_strides.time), offset_step(maps.offset_strides.time), factor(maps.factor) {
        const long long i = channel / maps.inner, j = channel % maps.inner;
        value = maps.values + (VALUES ? i * maps.value_strides.outer + j * maps.value_strides.inner : 0);
        value += VALUES ? (stop - 1) * value_step : 0;
        offset = maps.offsets + i * maps.offset_strides.outer + j * maps.offset_strides.inner;
        offset += (stop - 1) * offset_step;
    }

    __device__ void read(A &a, A &c) {
        a = factor;
        if (VALUES) a = widen(*value);
        c = widen(*offset);
        value -= value_step;
        offset -= offset_step;
    }
};

// Give visit(a[i], c[i]) the next `steps` maps. Inputs are held in tiles, and all loads of a tile are under way before
// the tile before it is visited: a thread waits for memory once in ROWS steps.
template <bool VALUES, typename T, typename A, typename Visit>
__device__ inline void backwards(Reader<VALUES, T, A> maps, long long steps, Visit visit) {
    constexpr int ROWS = 64 / sizeof(A);
    A a[ROWS], c[ROWS], next_a[ROWS], next_c[ROWS];
    const int odd = steps % ROWS;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        if (row < odd) maps.read(a[row], c[row]);
    }
    long long tiles = steps / ROWS;
    if (tiles > 0) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) maps.read(next_a[row], next_c[row]);
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        if (row < odd) visit(a[row], c[row]);
    }
#pragma unroll 1
    while (tiles-- > 0) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            a[row] = next_a[row];
            c[row] = next_c[row];
        }
        if (tiles > 0) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) maps.read(next_a[row], next_c[row]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) visit(a[row], c[row]);
    }
}

// Each chunk's part of the solution. `carries`, (chunks, channels), are the values that enter the chunks; without
// them there is one chunk.
template <bool VALUES, typename T, typename A>
__device__ inline void scan(const Maps<T, A> &maps, long long chunk, const A *__restrict__ carries, T *__restrict__ g) {
    const long long thread = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long channel = thread % maps.channels, start = thread / maps.channels * chunk;
    if (start >= maps.length && start > 0) return;
    const long long stop = start + chunk < maps.length ? start + chunk : maps.length;
    Reader<VALUES, T, A> reader(maps, channel, stop);
    A carry = carries ? carries[thread] : A(widen(reader.offset[reader.offset_step]));
    T *out = g + stop * maps.channels + channel;
    if (stop == maps.length) narrow(carry, *out);
    backwards(reader, stop - start, [&](A a, A c) {
        carry = a * carry + c;
        out -= maps.channels;
        narrow(carry, *out);
    });
}

// The composed map of each chunk but the first, in row chunk - 1; the last row of `offsets` is c[L].
template <bool VALUES, typename T, typename A>
__device__ inline void summaries(const Maps<T, A> &maps, long long chunk, A *__restrict__ products,
                                 A *__restrict__ offsets) {
    const long long thread = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long channel = thread % maps.channels, start = (thread / maps.channels + 1) * chunk;
    if (start >= maps.length) return;
    const long long stop = start + chunk < maps.length ? start + chunk : maps.length;
    const Reader<VALUES, T, A> reader(maps, channel, stop);
    A product = A(1), offset = A(0);
    backwards(reader, stop - start, [&](A a, A c) {
        product = a * product;
        offset = a * offset + c;
    });
    products[thread] = product;
    offsets[thread] = offset;
    if (stop == maps.length) offsets[thread + maps.channels] = widen(reader.offset[reader.offset_step]);
}

#define MAPS(T)                                                                                                    \
    const T *values, const T *offsets, double factor, long long value_time, long long value_outer,                 \
        long long value_inner, long long offset_time, long long offset_outer, long long offset_inner,              \
        long long length, long long channels, long long inner, long long chunk
#define ALL(T, A)                                                                                                  \
    Maps<T, A> {                                                                                                   \
        values, offsets, A(factor), {value_time, value_outer, value_inner},                                        \
            {offset_time, offset_outer, offset_inner}, length, channels, inner                                     \
    }
#define KERNELS(T, A, NAME)                                                                                        \
    extern "C" __global__ void scan_##NAME(MAPS(T), const A *carries, T *g) {                                      \
        if (values) scan<true>(ALL(T, A), chunk, carries, g);                                                      \
        else scan<false>(ALL(T, A), chunk, carries, g);                                                            \
    }                                                                                                              \
    extern "C" __global__ void summaries_##NAME(MAPS(T), A *products, A *chunk_offsets) {                          \
        if (values) summaries<true>(ALL(T, A), chunk, products, chunk_offsets);                                    \
        else summaries<false>(ALL(T, A), chunk, products, chunk_offsets);                                          \
    }

KERNELS(float16, float, float16)
KERNELS(float, float, float32)
KERNELS(double, double, float64)
