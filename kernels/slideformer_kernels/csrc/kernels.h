/* The loops, over the operations of the isa_*.h file included before this one. No include guard: included
 * once for each instruction set. Formulas: reference.py.
 *
 * Each loop takes whole vectors and leaves the last few elements to the portable path, whose bits are the
 * same. Loads and stores are unaligned ones; on aligned buffers they cost nothing more. */

TARGET INLINE VF ISA(load_grad)(const void *grad, int64_t i, int is_bf16)
{
    return is_bf16 ? vf_of_bits(vi_shift_left_16(vi_load_u16((const uint16_t *)grad + i)))
                   : vf_load((const float *)grad + i);
}

TARGET INLINE VF ISA(load_master)(const uint16_t *hi, const int16_t *lo, int64_t i)
{
    return vf_of_bits(vi_add(vi_shift_left_16(vi_load_u16(hi + i)), vi_load_i16(lo + i)));
}

TARGET INLINE void ISA(store_master)(uint16_t *hi, int16_t *lo, int64_t i, VF value)
{
    VI bits = vf_bits(value);
    VI hi_bits = vi_shift_right_16(vi_add(bits, vi_set1(0x8000)));
    VI lo_bits = vi_sub(bits, vi_shift_left_16(hi_bits));
    vi_store_u16(hi + i, vi_replace_where_nan(value, hi_bits, vi_set1(CANONICAL_NAN >> 16)));
    vi_store_i16(lo + i, vi_replace_where_nan(value, lo_bits, vi_set1(0)));
}

TARGET INLINE VF ISA(canonical_nan)(VF x)
{
    return vf_of_bits(vi_replace_where_nan(x, vf_bits(x), vi_set1(CANONICAL_NAN)));
}

TARGET INLINE int64_t ISA(adamw)(const adamw_args *args, int64_t begin, int64_t end, int is_split,
                                 int grad_is_bf16)
{
    uint16_t *restrict hi = args->hi;
    int16_t *restrict lo = args->lo;
    float *restrict param = args->param;
    const void *restrict grad = args->grad;
    float *restrict exp_avg = args->exp_avg;
    float *restrict exp_avg_sq = args->exp_avg_sq;
    const VF decay = vf_set1(args->decay);
    const VF one_minus_beta1 = vf_set1(args->one_minus_beta1);
    const VF beta2 = vf_set1(args->beta2);
    const VF one_minus_beta2 = vf_set1(args->one_minus_beta2);
    const VF inv_bias_correction2_sqrt = vf_set1(args->inv_bias_correction2_sqrt);
    const VF eps = vf_set1(args->eps);
    const VF minus_step_size = vf_set1(-args->step_size);
    const VF grad_scale = vf_set1(args->grad_scale);
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
        /* The hardware's prefetcher stops at page ends, and five streams reach one every 1024 elements. */
        prefetch(exp_avg + i + PREFETCH_NUMEL);
        prefetch(exp_avg_sq + i + PREFETCH_NUMEL);
        prefetch((const char *)grad + (i + PREFETCH_NUMEL) * (grad_is_bf16 ? 2 : 4));
        if (is_split) {
            prefetch(hi + i + PREFETCH_NUMEL);
            prefetch(lo + i + PREFETCH_NUMEL);
        } else {
            prefetch(param + i + PREFETCH_NUMEL);
        }
        VF g = vf_mul(ISA(load_grad)(grad, i, grad_is_bf16), grad_scale);
        VF m = vf_load(exp_avg + i);
        VF v = vf_load(exp_avg_sq + i);
        VF p = is_split ? ISA(load_master)(hi, lo, i) : vf_load(param + i);
        m = vf_fma(one_minus_beta1, vf_sub(g, m), m);
        v = vf_fma(vf_mul(one_minus_beta2, g), g, vf_mul(beta2, v));
        VF d = vf_fma(vf_sqrt(v), inv_bias_correction2_sqrt, eps);
        p = vf_fma(minus_step_size, vf_div(m, d), vf_mul(p, decay));
        vf_store(exp_avg + i, ISA(canonical_nan)(m));
        vf_store(exp_avg_sq + i, ISA(canonical_nan)(v));
        if (is_split)
            ISA(store_master)(hi, lo, i, p);
        else
            vf_store(param + i, ISA(canonical_nan)(p));
    }
    return i;
}

TARGET static void ISA(adamw_split_bf16)(const void *args, int64_t begin, int64_t end)
{
    begin = ISA(adamw)(args, begin, end, 1, 1);
    FINISH(adamw_split_bf16);
}

TARGET static void ISA(adamw_split_fp32)(const void *args, int64_t begin, int64_t end)
{
    begin = ISA(adamw)(args, begin, end, 1, 0);
    FINISH(adamw_split_fp32);
}

TARGET static void ISA(adamw_fp32_bf16)(const void *args, int64_t begin, int64_t end)
{
    begin = ISA(adamw)(args, begin, end, 0, 1);
    FINISH(adamw_fp32_bf16);
}

TARGET static void ISA(adamw_fp32_fp32)(const void *args, int64_t begin, int64_t end)
{
    begin = ISA(adamw)(args, begin, end, 0, 0);
    FINISH(adamw_fp32_fp32);
}

TARGET INLINE int64_t ISA(accumulate)(const accumulate_args *args, int64_t begin, int64_t end,
                                      int grad_is_bf16)
{
    float *restrict acc = args->acc;
    const void *restrict grad = args->grad;
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES)
        vf_store(acc + i,
                 ISA(canonical_nan)(vf_add(vf_load(acc + i), ISA(load_grad)(grad, i, grad_is_bf16))));
    return i;
}

TARGET static void ISA(accumulate_bf16)(const void *args, int64_t begin, int64_t end)
{
    begin = ISA(accumulate)(args, begin, end, 1);
    FINISH(accumulate_bf16);
}

TARGET static void ISA(accumulate_fp32)(const void *args, int64_t begin, int64_t end)
{
    begin = ISA(accumulate)(args, begin, end, 0);
    FINISH(accumulate_fp32);
}

TARGET static void ISA(split)(const void *args, int64_t begin, int64_t end)
{
    const float *restrict master = ((const master_args *)args)->master;
    uint16_t *restrict hi = ((const master_args *)args)->hi;
    int16_t *restrict lo = ((const master_args *)args)->lo;
    for (; begin + LANES <= end; begin += LANES)
        ISA(store_master)(hi, lo, begin, vf_load(master + begin));
    FINISH(split);
}

TARGET static void ISA(join)(const void *args, int64_t begin, int64_t end)
{
    float *restrict master = ((const master_args *)args)->master;
    const uint16_t *restrict hi = ((const master_args *)args)->hi;
    const int16_t *restrict lo = ((const master_args *)args)->lo;
    for (; begin + LANES <= end; begin += LANES)
        vf_store(master + begin, ISA(load_master)(hi, lo, begin));
    FINISH(join);
}

/* ---- Sums of rows by halving. Plain C: the compiler vectorises these loops, and as it may not reorder
 * floating point sums, their values are the same for every instruction set. ---- */

TARGET INLINE double ISA(halve)(double *sums, int count)
{
    for (int half = count / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            sums[i] += sums[i + half];
    return sums[0];
}

/* The first two halvings at once, straight from the values: sums[i] of a row halved to 256. */
#define QUARTER ((ROW) / 4)
#define FIRST_HALVINGS(SQUARED)                                                                             \
    for (int i = 0; i < QUARTER; i++)                                                                       \
        sums[i] = (SQUARED(i) + SQUARED(i + 2 * QUARTER)) + (SQUARED(i + QUARTER) + SQUARED(i + 3 * QUARTER))

TARGET INLINE double ISA(row_sum_bf16)(const uint16_t *restrict row)
{
    double sums[QUARTER];
#define WIDE_BF16(i) ((double)float_of((uint32_t)row[i] << 16))
#define SQUARED_BF16(i) (WIDE_BF16(i) * WIDE_BF16(i))
    FIRST_HALVINGS(SQUARED_BF16);
    return ISA(halve)(sums, QUARTER);
}

TARGET INLINE double ISA(row_sum_fp32)(const float *restrict row)
{
    double sums[QUARTER];
#define SQUARED_FP32(i) ((double)row[i] * (double)row[i])
    FIRST_HALVINGS(SQUARED_FP32);
    return ISA(halve)(sums, QUARTER);
}

TARGET INLINE double ISA(row_sum_fp64)(const double *restrict row)
{
    double sums[QUARTER];
#define PLAIN_FP64(i) (row[i])
    FIRST_HALVINGS(PLAIN_FP64);
    return ISA(halve)(sums, QUARTER);
}

/* The last row may be short: it is padded with zeros. */
#define DEFINE_ROW_SUMS(NAME, TYPE, ROW_SUM)                                                                \
    TARGET static void ISA(NAME)(const void *args, int64_t begin, int64_t end)                              \
    {                                                                                                       \
        const TYPE *values = ((const row_sum_args *)args)->values;                                          \
        int64_t numel = ((const row_sum_args *)args)->numel;                                                \
        double *sums = ((const row_sum_args *)args)->sums;                                                  \
        for (; begin < end && (begin + 1) * ROW <= numel; begin++)                                          \
            sums[begin] = ISA(ROW_SUM)(values + begin * ROW);                                               \
        if (begin < end) {                                                                                  \
            TYPE padded[ROW] = {0};                                                                         \
            memcpy(padded, values + begin * ROW, (size_t)(numel - begin * ROW) * sizeof(TYPE));             \
            sums[begin] = ISA(ROW_SUM)(padded);                                                             \
        }                                                                                                   \
    }

DEFINE_ROW_SUMS(row_sums_bf16, uint16_t, row_sum_bf16)
DEFINE_ROW_SUMS(row_sums_fp32, float, row_sum_fp32)
DEFINE_ROW_SUMS(row_sums_fp64, double, row_sum_fp64)

static const kernel_table ISA(kernels) = {
    ISA(adamw_split_bf16), ISA(adamw_split_fp32), ISA(adamw_fp32_bf16), ISA(adamw_fp32_fp32),
    ISA(accumulate_bf16),  ISA(accumulate_fp32),  ISA(split),           ISA(join),
    ISA(row_sums_bf16),    ISA(row_sums_fp32),    ISA(row_sums_fp64),
};

#undef QUARTER
#undef FIRST_HALVINGS
#undef WIDE_BF16
#undef SQUARED_BF16
#undef SQUARED_FP32
#undef PLAIN_FP64
#undef DEFINE_ROW_SUMS
