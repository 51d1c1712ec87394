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

/* The numbers of a step, each in all lanes. */
typedef struct {
    VF grad_scale;
    VF scalars[SCALARS];
} ISA(constants);

TARGET INLINE ISA(constants) ISA(constants_of)(const update_args *args)
{
    const float *scalars = args->scalars;
    ISA(constants) constants = {
        .grad_scale = vf_set1(args->grad_scale),
        .scalars = {vf_set1(scalars[0]), vf_set1(scalars[1]), vf_set1(scalars[2]), vf_set1(scalars[3]),
                    vf_set1(scalars[4]), vf_set1(scalars[5]), vf_set1(scalars[6])},
    };
    return constants;
}

/* ---- Rules: weight and moments of one vector, given the scaled gradient and the scalars ---- */

/* Returns sqrt(v). */
TARGET INLINE VF ISA(adamw)(const VF *scalars, VF g, VF *p, VF *m, VF *v)
{
    const VF decay = scalars[0], one_minus_beta1 = scalars[1], beta2 = scalars[2];
    const VF one_minus_beta2 = scalars[3], inv_bias_correction2_sqrt = scalars[4], eps = scalars[5];
    const VF minus_step_size = scalars[6];
    *m = vf_fma(one_minus_beta1, vf_sub(g, *m), *m);
    *v = vf_fma(vf_mul(one_minus_beta2, g), g, vf_mul(beta2, *v));
    VF r = vf_sqrt(*v);
    VF d = vf_fma(r, inv_bias_correction2_sqrt, eps);
    *p = vf_fma(*p, decay, vf_mul(minus_step_size, vf_div(*m, d)));
    return r;
}

/* 1 with the sign of x, 0 for either zero, NaN for NaN. */
TARGET INLINE VF ISA(sign)(VF x)
{
    VI magnitude = vi_min_u32(vi_and(vf_bits(x), vi_set1(0x7FFFFFFF)), vi_set1(1));
    VF sign = vf_of_int(vi_negate_where_negative(vf_bits(x), magnitude));
    return vf_of_bits(vi_replace_where_nan(x, vf_bits(sign), vi_set1(CANONICAL_NAN)));
}

TARGET INLINE void ISA(lion)(const VF *scalars, VF g, VF *p, VF *m)
{
    const VF decay = scalars[0], beta1 = scalars[1], one_minus_beta1 = scalars[2], beta2 = scalars[3];
    const VF one_minus_beta2 = scalars[4], minus_step_size = scalars[5];
    VF c = vf_fma(beta1, *m, vf_mul(one_minus_beta1, g));
    *p = vf_fma(*p, decay, vf_mul(minus_step_size, ISA(sign)(c)));
    *m = vf_fma(beta2, *m, vf_mul(one_minus_beta2, g));
}

/* Without a buffer, or with momentum_buffer in b. The flags are read from args: as numbers that are the same for all
 * elements they decide about branches, which cost nothing. */
TARGET INLINE void ISA(sgd)(const update_args *args, const VF *scalars, VF g, VF *p, VF *b, int has_buffer)
{
    const VF weight_decay = scalars[0], momentum = scalars[1], one_minus_dampening = scalars[2];
    const float nesterov = args->scalars[3], is_first = args->scalars[4];
    const VF minus_step_size = scalars[5];
    VF d = vf_fma(weight_decay, *p, g);
    if (has_buffer) {
        *b = is_first != 0.0f ? d : vf_fma(momentum, *b, vf_mul(one_minus_dampening, d));
        d = nesterov != 0.0f ? vf_fma(momentum, *b, d) : *b;
    }
    *p = vf_fma(minus_step_size, d, *p);
}

/* ---- Updates on fp32 moments ---- */

/* The hardware's prefetcher stops at page ends, and five streams reach one every 1024 elements. Called once for
 * PREFETCH_STEP elements, a cache line of the 16-bit streams. */
TARGET INLINE void ISA(prefetch_masters)(const update_args *args, int64_t i, int is_split, int grad_is_bf16)
{
    i += PREFETCH_NUMEL;
    if (is_split) {
        prefetch(args->hi + i);
        prefetch(args->lo + i);
    } else {
        prefetch(args->param + i);
        prefetch(args->param + i + PREFETCH_STEP / 2);
    }
    if (grad_is_bf16) {
        prefetch((const uint16_t *)args->grad + i);
    } else {
        prefetch((const float *)args->grad + i);
        prefetch((const float *)args->grad + i + PREFETCH_STEP / 2);
    }
}

TARGET INLINE void ISA(update_vector)(const update_args *args, const ISA(constants) *constants, int64_t i,
                                      int rule, int is_split, int grad_is_bf16)
{
    const int moments = moments_of(rule);
    float *const first = (float *)args->moments[0] + i;
    float *const second = (float *)args->moments[1] + i;
    const VF *scalars = constants->scalars;
    VF m = moments > 0 ? vf_load(first) : vf_set1(0.0f);
    VF v = moments > 1 ? vf_load(second) : vf_set1(0.0f);
    VF p = is_split ? ISA(load_master)(args->hi, args->lo, i) : vf_load(args->param + i);
    VF g = vf_mul(ISA(load_grad)(args->grad, i, grad_is_bf16), constants->grad_scale);
    switch (rule) {
    case ADAMW:
        ISA(adamw)(scalars, g, &p, &m, &v);
        break;
    case LION:
        ISA(lion)(scalars, g, &p, &m);
        break;
    case SGD:
    case SGD_MOMENTUM:
        ISA(sgd)(args, scalars, g, &p, &m, moments > 0);
        break;
    }
    if (moments > 0)
        vf_store(first, ISA(canonical_nan)(m));
    if (moments > 1)
        vf_store(second, ISA(canonical_nan)(v));
    if (is_split)
        ISA(store_master)(args->hi, args->lo, i, p);
    else
        vf_store(args->param + i, ISA(canonical_nan)(p));
}

TARGET INLINE int64_t ISA(update)(const update_args *shared, int64_t begin, int64_t end, int rule,
                                  int is_split, int grad_is_bf16)
{
    /* A copy that no store can be taken to change, so its pointers stay in registers. */
    const update_args own = *shared;
    const update_args *args = &own;
    const ISA(constants) constants = ISA(constants_of)(args);
    int64_t i = begin;
    if (LANES > 1)
        for (; i + PREFETCH_STEP <= end; i += PREFETCH_STEP) {
#pragma GCC unroll 2
            for (int k = 0; k < moments_of(rule); k++) {
                prefetch((float *)args->moments[k] + i + PREFETCH_NUMEL);
                prefetch((float *)args->moments[k] + i + PREFETCH_NUMEL + PREFETCH_STEP / 2);
            }
            ISA(prefetch_masters)(args, i, is_split, grad_is_bf16);
#pragma GCC unroll 4
            for (int j = 0; j < PREFETCH_STEP; j += LANES)
                ISA(update_vector)(args, &constants, i + j, rule, is_split, grad_is_bf16);
        }
    for (; i + LANES <= end; i += LANES)
        ISA(update_vector)(args, &constants, i, rule, is_split, grad_is_bf16);
    return i;
}

/* ---- The update on 8-bit moments ----
 *
 * A block's codes can be computed only when all its new moments are known. These wait in L1 while the next
 * block is updated, and the vectors of the two blocks take turns: both need the divider, which alternating
 * keeps busy (12 % faster than one block after the other). */

#if VECTORS == 1
/* Loads and stores of VECTORS vectors. Where these are more than one, the isa_*.h file defines the seven
 * functions, and may spread the elements over its vectors in any order that all seven share. It may also load
 * exp_avg's codes times a power of two, which does not change the products' bits: SQUARED_CODE_UNIT takes its
 * square back. */
TARGET INLINE void ISA(load_masters)(const uint16_t *hi, const int16_t *lo, VF *p)
{
    p[0] = ISA(load_master)(hi, lo, 0);
}

TARGET INLINE void ISA(store_masters)(uint16_t *hi, int16_t *lo, const VF *p)
{
    ISA(store_master)(hi, lo, 0, p[0]);
}

TARGET INLINE void ISA(load_floats)(const float *from, VF *x)
{
    x[0] = vf_load(from);
}

TARGET INLINE void ISA(store_floats)(float *to, const VF *x)
{
    vf_store(to, ISA(canonical_nan)(x[0]));
}

TARGET INLINE void ISA(load_bf16s)(const uint16_t *from, VF *x)
{
    x[0] = ISA(load_grad)(from, 0, 1);
}

TARGET INLINE void ISA(load_codes)(const int8_t *exp_avg, const uint8_t *exp_avg_sq, VF *m, VF *r)
{
    m[0] = vf_of_int(vi_load_i8(exp_avg));
    r[0] = vf_of_int(vi_load_u8(exp_avg_sq));
}

TARGET INLINE void ISA(store_codes)(int8_t *exp_avg, uint8_t *exp_avg_sq, const VI *m, const VI *r)
{
    vi_store_i8(exp_avg, m[0]);
    vi_store_u8(exp_avg_sq, r[0]);
}
#endif

typedef struct {
    float m[MOMENT_BLOCK] __attribute__((aligned(64)));
    float r[MOMENT_BLOCK] __attribute__((aligned(64)));
    float m_inverse, r_inverse; /* by what to multiply before the square root, which is in units of 1/1024 */
    int8_t *exp_avg;            /* where the codes go */
    uint8_t *exp_avg_sq;
} ISA(moment_block);

/* The code of a magnitude: its root in units of 1/1024, dithered by the low bits of the value itself. */
TARGET INLINE VI ISA(code)(VF magnitude, float inverse)
{
    VI root = vi_round(vf_sqrt(vf_mul(magnitude, vf_set1(inverse))));
    VI low_bits = vi_and(vf_bits(magnitude), vi_set1((1 << DITHER_BITS) - 1));
    return vi_shift_right(vi_add(root, low_bits), DITHER_BITS);
}

/* Store the codes of VECTORS vectors. */
TARGET INLINE void ISA(finish_codes)(const ISA(moment_block) *block, int j)
{
    VI m_codes[VECTORS], r_codes[VECTORS];
#pragma GCC unroll 2
    for (int k = 0; k < VECTORS; k++) {
        VI m_bits = vf_bits(vf_load(block->m + j + k * LANES));
        VF m = vf_of_bits(vi_and(m_bits, vi_set1(0x7FFFFFFF)));
        m_codes[k] = vi_negate_where_negative(m_bits, ISA(code)(m, block->m_inverse));
        VF r = vf_load(block->r + j + k * LANES);
        VI floor = vi_min_u32(vf_bits(r), vi_set1(1)); /* r is not negative: 1 where it is not 0 */
        r_codes[k] = vi_max_u32(ISA(code)(r, block->r_inverse), floor);
    }
    ISA(store_codes)(block->exp_avg + j, block->exp_avg_sq + j, m_codes, r_codes);
}

/* Store the scale, given the highest magnitudes of a block's values. Returns their inverse as above; where it
 * does not exist, the values become 0, and so will their codes. */
TARGET INLINE float ISA(store_scale)(float *scale, VI magnitude_bits, float levels, float *values)
{
    uint32_t bits = vi_highest_u32(magnitude_bits);
    if (bits > INFINITY_BITS)
        bits = CANONICAL_NAN;
    if (bits < SMALLEST_SCALE_BITS)
        bits = 0;
    *scale = float_of(bits);
    if (bits == 0 || bits >= INFINITY_BITS) {
        memset(values, 0, MOMENT_BLOCK * sizeof *values);
        return 0.0f;
    }
    return levels * (float)(1 << 2 * DITHER_BITS) / float_of(bits);
}

/* begin is that of a block. Vector paths leave a short last block to the portable one. */
TARGET INLINE int64_t ISA(update_8bit)(const update_args *args, int64_t begin, int64_t end, int is_split,
                                       int grad_is_bf16)
{
    uint16_t *restrict hi = args->hi;
    int16_t *restrict lo = args->lo;
    float *restrict param = args->param;
    const void *restrict grad = args->grad;
    int8_t *exp_avg = args->moments[0];
    float *exp_avg_scale = args->moments[1];
    uint8_t *exp_avg_sq = args->moments[2];
    float *exp_avg_sq_scale = args->moments[3];
    const ISA(constants) constants = ISA(constants_of)(args);
    const VI magnitude_mask = vi_set1(0x7FFFFFFF);
    uint8_t nowhere[MOMENT_BLOCK];
    ISA(moment_block) blocks[2] = {{.exp_avg = (int8_t *)nowhere, .exp_avg_sq = nowhere}};
    ISA(moment_block) *previous = &blocks[0];
    ISA(moment_block) *block = &blocks[1];
    for (; begin + (LANES > 1 ? MOMENT_BLOCK : 1) <= end; begin += MOMENT_BLOCK) {
        int count = end - begin < MOMENT_BLOCK ? (int)(end - begin) : MOMENT_BLOCK;
        float *m_scale = exp_avg_scale + begin / MOMENT_BLOCK;
        float *r_scale = exp_avg_sq_scale + begin / MOMENT_BLOCK;
        const VF m_scales = vf_set1(*m_scale);
        const VF r_scales = vf_set1(*r_scale);
        VI highest_m = vi_set1(0);
        VI highest_r = vi_set1(0);
        for (int j = 0; j < count; j += VECTORS * LANES) {
            int64_t i = begin + j;
            if (LANES > 1 && j % PREFETCH_STEP == 0) {
                prefetch(exp_avg + i + PREFETCH_NUMEL);
                prefetch(exp_avg_sq + i + PREFETCH_NUMEL);
                ISA(prefetch_masters)(args, i, is_split, grad_is_bf16);
            }
            VF q_m[VECTORS], q_r[VECTORS], p[VECTORS], g[VECTORS];
            ISA(load_codes)(exp_avg + i, exp_avg_sq + i, q_m, q_r);
            if (is_split)
                ISA(load_masters)(hi + i, lo + i, p);
            else
                ISA(load_floats)(param + i, p);
            if (grad_is_bf16)
                ISA(load_bf16s)((const uint16_t *)grad + i, g);
            else
                ISA(load_floats)((const float *)grad + i, g);
#pragma GCC unroll 2
            for (int k = 0; k < VECTORS; k++) {
                VF abs_q = vf_of_bits(vi_and(vf_bits(q_m[k]), magnitude_mask));
                VF m = vf_mul(vf_mul(q_m[k], abs_q), vf_set1(SQUARED_CODE_UNIT / EXP_AVG_LEVELS));
                m = vf_mul(m, m_scales);
                VF r = vf_mul(vf_mul(q_r[k], q_r[k]), vf_set1(1.0f / EXP_AVG_SQ_LEVELS));
                r = vf_mul(r, r_scales);
                VF v = vf_mul(r, r);
                r = ISA(adamw)(constants.scalars, vf_mul(g[k], constants.grad_scale), &p[k], &m, &v);
                vf_store(block->m + j + k * LANES, m);
                vf_store(block->r + j + k * LANES, r);
                highest_m = vi_max_u32(highest_m, vi_and(vf_bits(m), magnitude_mask));
                /* Not negative but for a NaN, which is above all numbers with either sign. */
                highest_r = vi_max_u32(highest_r, vf_bits(r));
            }
            if (is_split)
                ISA(store_masters)(hi + i, lo + i, p);
            else
                ISA(store_floats)(param + i, p);
            if (LANES > 1)
                ISA(finish_codes)(previous, j);
        }
        block->m_inverse = ISA(store_scale)(m_scale, highest_m, EXP_AVG_LEVELS, block->m);
        block->r_inverse = ISA(store_scale)(r_scale, highest_r, EXP_AVG_SQ_LEVELS, block->r);
        block->exp_avg = exp_avg + begin;
        block->exp_avg_sq = exp_avg_sq + begin;
        if (LANES == 1)
            for (int j = 0; j < count; j++)
                ISA(finish_codes)(block, j);
        ISA(moment_block) *swap = previous;
        previous = block;
        block = swap;
    }
    if (LANES > 1)
        for (int j = 0; j < MOMENT_BLOCK; j += VECTORS * LANES)
            ISA(finish_codes)(previous, j);
    return begin;
}

/* A rule's four kernels, with the last elements left to the portable path. */
#define DEFINE_UPDATE(NAME, LOOP, ...)                                                                      \
    TARGET static void ISA(NAME)(const void *args, int64_t begin, int64_t end)                              \
    {                                                                                                       \
        begin = ISA(LOOP)(args, begin, end, __VA_ARGS__);                                                   \
        FINISH(NAME);                                                                                       \
    }
#define DEFINE_UPDATES(NAME, RULE)                                                                          \
    DEFINE_UPDATE(NAME##_fp32_fp32, update, RULE, 0, 0)                                                     \
    DEFINE_UPDATE(NAME##_fp32_bf16, update, RULE, 0, 1)                                                     \
    DEFINE_UPDATE(NAME##_split_fp32, update, RULE, 1, 0)                                                    \
    DEFINE_UPDATE(NAME##_split_bf16, update, RULE, 1, 1)
#define UPDATES(NAME)                                                                                       \
    {{ISA(NAME##_fp32_fp32), ISA(NAME##_fp32_bf16)}, {ISA(NAME##_split_fp32), ISA(NAME##_split_bf16)}}

DEFINE_UPDATES(adamw, ADAMW)
DEFINE_UPDATES(lion, LION)
DEFINE_UPDATES(sgd, SGD)
DEFINE_UPDATES(sgd_momentum, SGD_MOMENTUM)
DEFINE_UPDATE(adamw_8bit_fp32_fp32, update_8bit, 0, 0)
DEFINE_UPDATE(adamw_8bit_fp32_bf16, update_8bit, 0, 1)
DEFINE_UPDATE(adamw_8bit_split_fp32, update_8bit, 1, 0)
DEFINE_UPDATE(adamw_8bit_split_bf16, update_8bit, 1, 1)

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

/* A gradient is added row by row, and each row's squares are summed while it is near. */
TARGET INLINE void ISA(widen)(float *restrict acc, const void *restrict grad, int64_t begin, int64_t end,
                              int grad_is_bf16)
{
    if (!grad_is_bf16) {
        memcpy(acc + begin, (const float *)grad + begin, (size_t)(end - begin) * sizeof(float));
        return;
    }
    for (int64_t i = begin; i < end; i++)
        acc[i] = float_of((uint32_t)((const uint16_t *)grad)[i] << 16);
}

#define DEFINE_ACCUMULATE_ROWS(NAME, ADD, GRAD_IS_BF16)                                                     \
    TARGET static void ISA(NAME)(const void *args, int64_t begin, int64_t end)                              \
    {                                                                                                       \
        const accumulate_rows_args *work = args;                                                            \
        for (int64_t row = begin; row < end; row++) {                                                       \
            int64_t first = row * ROW;                                                                      \
            int64_t last = first + ROW < work->rows.numel ? first + ROW : work->rows.numel;                 \
            if (work->is_first)                                                                             \
                ISA(widen)(work->add.acc, work->add.grad, first, last, GRAD_IS_BF16);                       \
            else                                                                                            \
                ISA(ADD)(&work->add, first, last);                                                          \
            ISA(row_sums_fp32)(&work->rows, row, row + 1);                                                  \
        }                                                                                                   \
    }

DEFINE_ACCUMULATE_ROWS(accumulate_rows_bf16, accumulate_bf16, 1)
DEFINE_ACCUMULATE_ROWS(accumulate_rows_fp32, accumulate_fp32, 0)

static const kernel_table ISA(kernels) = {
    .update = {[ADAMW] = UPDATES(adamw),
               [ADAMW_8BIT] = UPDATES(adamw_8bit),
               [LION] = UPDATES(lion),
               [SGD] = UPDATES(sgd),
               [SGD_MOMENTUM] = UPDATES(sgd_momentum)},
    .accumulate_bf16 = ISA(accumulate_bf16),
    .accumulate_fp32 = ISA(accumulate_fp32),
    .split = ISA(split),
    .join = ISA(join),
    .row_sums_bf16 = ISA(row_sums_bf16),
    .row_sums_fp32 = ISA(row_sums_fp32),
    .row_sums_fp64 = ISA(row_sums_fp64),
    .accumulate_rows_bf16 = ISA(accumulate_rows_bf16),
    .accumulate_rows_fp32 = ISA(accumulate_rows_fp32),
};

#undef DEFINE_UPDATE
#undef DEFINE_UPDATES
#undef UPDATES
#undef QUARTER
#undef FIRST_HALVINGS
#undef WIDE_BF16
#undef SQUARED_BF16
#undef SQUARED_FP32
#undef PLAIN_FP64
#undef DEFINE_ACCUMULATE_ROWS
#undef DEFINE_ROW_SUMS
