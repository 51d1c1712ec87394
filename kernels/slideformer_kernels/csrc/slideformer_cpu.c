/* Updates of weights, gradient accumulation, split masters and the sum of squares on the CPU.
 *
 * The formulas, the split master and the summation tree are defined in reference.py, whose bits every path
 * here reproduces. kernels.h holds each loop once, written over the vector operations that the isa_*.h files
 * define, and is included once for each instruction set; the widest set that the CPU has is taken at run time.
 *
 * Must be compiled with -ffp-contract=off and without -ffast-math: the only fused operations are the explicit
 * ones. Plain C ABI; every function may be called from any thread; numel may be 0.
 */

#include <float.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "needs IEEE single precision arithmetic"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define HAVE_X86_64 1
#else
#include <fenv.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { ISA_BEST = 0, ISA_PORTABLE = 1, ISA_AVX2 = 2, ISA_AVX512 = 3, ISA_COUNT = 4 };
enum { STATUS_OK = 0, STATUS_UNSUPPORTED_ISA = 1, STATUS_NO_MEMORY = 2 };

enum { ROW = 1024 };

#define CANONICAL_NAN 0x7FC00000u
#define INFINITY_BITS 0x7F800000u

/* Of the 8-bit moments. */
enum { MOMENT_BLOCK = 128 };
#define EXP_AVG_LEVELS 16129.0f
#define EXP_AVG_SQ_LEVELS 65025.0f
#define SMALLEST_SCALE_BITS 0x12800000u /* 2**-90 */
#define DITHER_BITS 10

/* A thread is worth waking for this many elements (about 0.1 ms of work). */
#define GRAIN_NUMEL 32768
/* Elements between two prefetches of a stream of 16-bit elements: a cache line. */
#define PREFETCH_STEP 32
/* Threads meet at multiples of this: whole blocks of 8-bit moments, and 1 KiB of their codes, so no cache line
 * but those of scales is shared by two writers. */
#define BOUNDARY_NUMEL 1024

/* Update rules with the format of their moments: rows of a kernel table. The numbers are those in cpu.py. */
enum { ADAMW = 0, ADAMW_8BIT = 1, LION = 2, SGD = 3, SGD_MOMENTUM = 4, UPDATE_COUNT = 5 };
enum { MOMENTS = 4, SCALARS = 7 }; /* at the most */

typedef struct {
    uint16_t *hi; /* split master, or NULL */
    int16_t *lo;
    float *param; /* plain fp32 master, or NULL */
    const void *grad;
    void *moments[MOMENTS]; /* in the order of rules.py */
    float grad_scale;
    float scalars[SCALARS]; /* in the order of kernel_arguments in scalars.py */
} update_args;

typedef struct {
    float *acc;
    const void *grad;
} accumulate_args;

typedef struct {
    float *master;
    uint16_t *hi;
    int16_t *lo;
} master_args;

typedef struct {
    const void *values;
    int64_t numel;
    double *sums; /* one per row */
} row_sum_args;

typedef struct {
    accumulate_args add;
    int is_first; /* there is nothing to add to */
    row_sum_args rows; /* of the sum */
} accumulate_rows_args;

/* Works on elements (row sums: rows) begin..end of what args describes. */
typedef void (*range_function)(const void *args, int64_t begin, int64_t end);

typedef struct {
    range_function update[UPDATE_COUNT][2][2]; /* [.][is the master split][is the gradient bf16] */
    range_function accumulate_bf16, accumulate_fp32, split, join;
    range_function row_sums_bf16, row_sums_fp32, row_sums_fp64;
    range_function accumulate_rows_bf16, accumulate_rows_fp32;
} kernel_table;

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Correctly rounded fused multiply-add. Without the instruction: exact product and TwoSum in double, rounded
 * to odd, then to float (Boldo & Melquiond 2008); the C library's fmaf would be a slow call. */
INLINE float fma_float(float a, float b, float c)
{
#if defined(__FP_FAST_FMAF) || defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    double product = (double)a * (double)b;
    double addend = (double)c;
    double total = product + addend;
    double addend_part = total - product;
    double error = (product - (total - addend_part)) + (addend - addend_part);
    int64_t bits;
    memcpy(&bits, &total, sizeof bits);
    int64_t is_even = ~bits & 1;
    int64_t inexact = (error > 0.0) | (error < 0.0); /* 0 for the NaN error of an infinite total */
    int64_t step = (error > 0.0) == (total > 0.0) ? 1 : -1;
    bits += step & -(is_even & inexact);
    memcpy(&total, &bits, sizeof bits);
    return (float)total;
#endif
}

/* How many fp32 moments a rule keeps. */
INLINE int moments_of(int rule)
{
    return rule == ADAMW ? 2 : rule == SGD ? 0 : 1;
}

#include "isa_portable.h"
#include "kernels.h"
#include "isa_undefine.h"

#ifdef HAVE_X86_64
#include "isa_avx2.h"
#include "kernels.h"
#include "isa_undefine.h"

#include "isa_avx512.h"
#include "kernels.h"
#include "isa_undefine.h"
#endif

static int isa_supported(int isa)
{
    switch (isa) {
    case ISA_BEST:
    case ISA_PORTABLE:
        return 1;
#ifdef HAVE_X86_64
    case ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case ISA_AVX512:
        return isa_supported(ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#endif
    default:
        return 0;
    }
}

static const kernel_table *kernels_for(int isa)
{
    if (!isa_supported(isa))
        return NULL;
#ifdef HAVE_X86_64
    if (isa == ISA_AVX512 || (isa == ISA_BEST && isa_supported(ISA_AVX512)))
        return &kernels_avx512;
    if (isa == ISA_AVX2 || (isa == ISA_BEST && isa_supported(ISA_AVX2)))
        return &kernels_avx2;
#endif
    return &kernels_portable;
}

/* The rounding and denormal modes belong to each thread and are inherited from whoever created it (torch's
 * set_flush_denormal, for one), so they are set around the work and put back after it. */
#if defined(HAVE_X86_64)
typedef unsigned int float_mode;
static float_mode enter_ieee_mode(void)
{
    float_mode saved = _mm_getcsr();
    _mm_setcsr(0x1F80); /* nearest even, exceptions masked, neither flush-to-zero nor denormals-are-zero */
    return saved;
}
static void leave_ieee_mode(float_mode saved)
{
    _mm_setcsr(saved);
}
#elif defined(__aarch64__)
typedef uint64_t float_mode;
static float_mode enter_ieee_mode(void)
{
    float_mode saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
    return saved;
}
static void leave_ieee_mode(float_mode saved)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(saved) : "memory");
}
#else
typedef fenv_t float_mode;
static float_mode enter_ieee_mode(void)
{
    float_mode saved;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    return saved;
}
static void leave_ieee_mode(float_mode saved)
{
    fesetenv(&saved);
}
#endif

static void run_in_ieee_mode(range_function work, const void *args, int64_t begin, int64_t end)
{
    float_mode saved = enter_ieee_mode();
    work(args, begin, end);
    leave_ieee_mode(saved);
}

#ifdef _OPENMP
/* GNU OpenMP hangs in a forked child whose parent has already used it: its threads are not there. Such a
 * child (a dataloader worker, say) works alone. */
static int forked_after_first_use(void)
{
    static pid_t first_user; /* atomically 0 until the first parallel region */
    pid_t nobody = 0;
    pid_t self = getpid();
    if (__atomic_compare_exchange_n(&first_user, &nobody, self, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return 0;
    return nobody != self;
}
#endif

/* Run work on 0..count in pieces of grain to 8 grains, a multiple of boundary each. Threads take the next piece
 * as they finish one: cores do not run at one speed (others' work, the share of memory bandwidth that each gets),
 * and with one fixed piece per thread all would wait for the slowest. */
static void run_parallel(range_function work, const void *args, int64_t count, int64_t boundary,
                         int64_t grain, int threads)
{
    int64_t useful = (count + grain - 1) / grain;
    if (useful < threads)
        threads = (int)useful;
#ifdef _OPENMP
    if (threads > 1 && !forked_after_first_use()) {
        int64_t piece = count / (8 * (int64_t)threads);
        if (piece > 8 * grain)
            piece = 8 * grain;
        if (piece < grain)
            piece = grain;
        piece = (piece + boundary - 1) / boundary * boundary;
        int64_t pieces = (count + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t index = 0; index < pieces; index++) {
            int64_t end = (index + 1) * piece;
            run_in_ieee_mode(work, args, index * piece, end < count ? end : count);
        }
        return;
    }
#else
    (void)boundary;
#endif
    if (count > 0)
        run_in_ieee_mode(work, args, 0, count);
}

static void run_elements(range_function work, const void *args, int64_t numel, int threads)
{
    run_parallel(work, args, numel, BOUNDARY_NUMEL, GRAIN_NUMEL, threads);
}

EXPORT int slideformer_has_openmp(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

EXPORT int slideformer_supports_isa(int isa)
{
    return isa_supported(isa);
}

/* master: hi, with lo, or the fp32 parameters, with NULL. moments: MOMENTS pointers, scalars: SCALARS numbers after
 * grad_scale; what the rule does not have is not read. */
EXPORT int slideformer_update(int rule, void *master, int16_t *lo, const void *grad, int grad_is_bf16,
                              void *const *moments, const float *scalars, int64_t numel, int isa, int threads)
{
    const kernel_table *kernels = kernels_for(isa);
    if (!kernels)
        return STATUS_UNSUPPORTED_ISA;
    update_args args = {.lo = lo, .grad = grad, .grad_scale = scalars[0]};
    if (lo)
        args.hi = master;
    else
        args.param = master;
    memcpy(args.moments, moments, sizeof args.moments);
    memcpy(args.scalars, scalars + 1, sizeof args.scalars);
    run_elements(kernels->update[rule][lo != NULL][grad_is_bf16], &args, numel, threads);
    return STATUS_OK;
}

EXPORT int slideformer_accumulate(float *acc, const void *grad, int grad_is_bf16, int64_t numel, int isa,
                                  int threads)
{
    const kernel_table *kernels = kernels_for(isa);
    if (!kernels)
        return STATUS_UNSUPPORTED_ISA;
    accumulate_args args = {acc, grad};
    run_elements(grad_is_bf16 ? kernels->accumulate_bf16 : kernels->accumulate_fp32, &args, numel, threads);
    return STATUS_OK;
}

EXPORT int slideformer_split_master(const float *master, uint16_t *hi, int16_t *lo, int64_t numel, int isa,
                                    int threads)
{
    const kernel_table *kernels = kernels_for(isa);
    if (!kernels)
        return STATUS_UNSUPPORTED_ISA;
    master_args args = {(float *)master, hi, lo};
    run_elements(kernels->split, &args, numel, threads);
    return STATUS_OK;
}

EXPORT int slideformer_join_master(const uint16_t *hi, const int16_t *lo, float *master, int64_t numel,
                                   int isa, int threads)
{
    const kernel_table *kernels = kernels_for(isa);
    if (!kernels)
        return STATUS_UNSUPPORTED_ISA;
    master_args args = {master, (uint16_t *)hi, (int16_t *)lo};
    run_elements(kernels->join, &args, numel, threads);
    return STATUS_OK;
}

/* Sums of rows, which first_level makes from level_args, added up by the tree. level is that part of level_args
 * which says how many elements there are, and where the sums go. */
static int sum_rows(const kernel_table *kernels, range_function first_level, const void *level_args,
                    row_sum_args *level, double *result, int threads)
{
    *result = 0.0;
    if (level->numel == 0)
        return STATUS_OK;
    int64_t rows = (level->numel + ROW - 1) / ROW;
    int64_t next_rows = (rows + ROW - 1) / ROW;
    /* Two buffers in turn: a level's sums must not be written where another thread still reads. */
    double *sums = malloc((size_t)(rows + next_rows) * sizeof *sums);
    if (!sums)
        return STATUS_NO_MEMORY;
    double *next_sums = sums + rows;
    double *const buffers = sums;
    level->sums = sums;
    run_parallel(first_level, level_args, rows, 1, GRAIN_NUMEL / ROW, threads);
    while (rows > 1) {
        row_sum_args args = {sums, rows, next_sums};
        rows = (rows + ROW - 1) / ROW;
        run_parallel(kernels->row_sums_fp64, &args, rows, 1, GRAIN_NUMEL / ROW, threads);
        double *swap = sums;
        sums = next_sums;
        next_sums = swap;
    }
    *result = sums[0];
    free(buffers);
    return STATUS_OK;
}

EXPORT int slideformer_sum_of_squares(const void *values, int is_bf16, int64_t numel, double *result, int isa,
                                      int threads)
{
    const kernel_table *kernels = kernels_for(isa);
    if (!kernels)
        return STATUS_UNSUPPORTED_ISA;
    row_sum_args args = {values, numel, NULL};
    range_function first_level = is_bf16 ? kernels->row_sums_bf16 : kernels->row_sums_fp32;
    return sum_rows(kernels, first_level, &args, &args, result, threads);
}

EXPORT int slideformer_accumulate_squared(float *acc, const void *grad, int grad_is_bf16, int is_first,
                                          int64_t numel, double *result, int isa, int threads)
{
    const kernel_table *kernels = kernels_for(isa);
    if (!kernels)
        return STATUS_UNSUPPORTED_ISA;
    accumulate_rows_args args = {{acc, grad}, is_first, {acc, numel, NULL}};
    range_function first_level = grad_is_bf16 ? kernels->accumulate_rows_bf16 : kernels->accumulate_rows_fp32;
    return sum_rows(kernels, first_level, &args, &args.rows, result, threads);
}
