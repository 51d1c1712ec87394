/* 16 lanes: AVX-512 F, BW, DQ and VL. */
#define ISA(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
#define VECTORS 2 /* that the update on 8-bit moments takes at once */
#define SQUARED_CODE_UNIT 0x1p-32f
#define VF __m512
#define VI __m512i
#define FINISH(name) name##_portable(args, begin, end)
#define PREFETCH_NUMEL 512
#define prefetch(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)

#define vf_set1(x) _mm512_set1_ps(x)
#define vf_load(p) _mm512_loadu_ps(p)
#define vf_store(p, x) _mm512_storeu_ps(p, x)
#define vf_add(a, b) _mm512_add_ps(a, b)
#define vf_sub(a, b) _mm512_sub_ps(a, b)
#define vf_mul(a, b) _mm512_mul_ps(a, b)
#define vf_div(a, b) _mm512_div_ps(a, b)
#define vf_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define vf_sqrt(a) _mm512_sqrt_ps(a)
#define vf_bits(x) _mm512_castps_si512(x)
#define vf_of_bits(x) _mm512_castsi512_ps(x)

#define vi_set1(x) _mm512_set1_epi32((int)(x))
#define vi_add(a, b) _mm512_add_epi32(a, b)
#define vi_sub(a, b) _mm512_sub_epi32(a, b)
#define vi_shift_left_16(a) _mm512_slli_epi32(a, 16)
#define vi_shift_right_16(a) _mm512_srli_epi32(a, 16)
#define vi_load_u16(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define vi_load_i16(p) _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define vi_store_u16(p, x) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi32_epi16(x))
#define vi_store_i16(p, x) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi32_epi16(x))
/* In range of int32; rounds as MXCSR says, which is to nearest even here. */
#define vi_round(x) _mm512_cvtps_epi32(x)
#define vf_of_int(a) _mm512_cvtepi32_ps(a)
#define vi_and(a, b) _mm512_and_si512(a, b)
#define vi_shift_right(a, bits) _mm512_srli_epi32(a, bits)
#define vi_negate_where_negative(a, x)                                                                      \
    _mm512_mask_sub_epi32(x, _mm512_movepi32_mask(a), _mm512_setzero_si512(), x)
#define vi_max_u32(a, b) _mm512_max_epu32(a, b)
#define vi_min_u32(a, b) _mm512_min_epu32(a, b)
#define vi_highest_u32(a) _mm512_reduce_max_epu32(a)
#define vi_load_i8(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define vi_load_u8(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define vi_store_i8(p, x) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8(x))
#define vi_store_u8(p, x) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8(x))
#define vi_replace_where_nan(x, otherwise, if_nan)                                                          \
    _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), if_nan)

/* Two vectors at once, for the update on 8-bit moments, which is bound by computing (10 % faster than one by
 * one). Narrowing one vector to 16 bits costs two operations of the only port that shuffles; packing two costs
 * one, and unpacking puts bits where they are wanted without a shift. These work within each 128 bits, so the
 * first vector holds elements 0-3, 8-11, 16-19 and 24-27, the second the others. */

TARGET INLINE void load_masters_avx512(const uint16_t *hi, const int16_t *lo, __m512 *p)
{
    __m512i low = _mm512_loadu_si512(lo);
    /* The sum of hi << 16 and a negative lo: lo's bits are below those of hi - 1. */
    __m512i high = _mm512_add_epi16(_mm512_loadu_si512(hi), _mm512_srai_epi16(low, 15));
    p[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
    p[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

/* The canonical NaN for every NaN, all else as it is: one instruction. */
TARGET INLINE __m512i canonical_bits_avx512(__m512 x)
{
    const __m512i nan_from_first_else_second = _mm512_set1_epi32(0x11111100);
    const __m512 canonical = _mm512_castsi512_ps(_mm512_set1_epi32(CANONICAL_NAN));
    return _mm512_castps_si512(_mm512_fixupimm_ps(canonical, x, nan_from_first_else_second, 0));
}

TARGET INLINE void store_masters_avx512(uint16_t *hi, int16_t *lo, const __m512 *p)
{
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_set1_epi32(0xFFFF);
    __m512i a = canonical_bits_avx512(p[0]);
    __m512i b = canonical_bits_avx512(p[1]);
    _mm512_storeu_si512(hi, _mm512_packus_epi32(_mm512_srli_epi32(_mm512_add_epi32(a, half), 16),
                                                _mm512_srli_epi32(_mm512_add_epi32(b, half), 16)));
    _mm512_storeu_si512(lo, _mm512_packus_epi32(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
}

TARGET INLINE void load_floats_avx512(const float *from, __m512 *x)
{
    __m512 a = _mm512_loadu_ps(from);
    __m512 b = _mm512_loadu_ps(from + 16);
    x[0] = _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(2, 0, 2, 0));
    x[1] = _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 1, 3, 1));
}

TARGET INLINE void store_floats_avx512(float *to, const __m512 *x)
{
    __m512i a = canonical_bits_avx512(x[0]);
    __m512i b = canonical_bits_avx512(x[1]);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(a, first, b));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(a, second, b));
}

TARGET INLINE void load_bf16s_avx512(const uint16_t *from, __m512 *x)
{
    __m512i bits = _mm512_loadu_si512(from);
    x[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), bits));
    x[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), bits));
}

/* The codes of exp_avg come in the upper half of an integer, which keeps their sign: times 2**16. */
TARGET INLINE void load_codes_avx512(const int8_t *exp_avg, const uint8_t *exp_avg_sq, __m512 *m, __m512 *r)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i q = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)exp_avg));
    m[0] = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(zero, q));
    m[1] = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(zero, q));
    q = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)exp_avg_sq));
    r[0] = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(q, zero));
    r[1] = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(q, zero));
}

/* Both streams share the shuffles: 8 bytes of one, then 8 of the other. */
TARGET INLINE void store_codes_avx512(int8_t *exp_avg, uint8_t *exp_avg_sq, const __m512i *m, const __m512i *r)
{
    __m512i m_words = _mm512_and_si512(_mm512_packs_epi32(m[0], m[1]), _mm512_set1_epi16(0xFF));
    __m512i r_words = _mm512_packs_epi32(r[0], r[1]);
    __m512i bytes = _mm512_packus_epi16(m_words, r_words);
    bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes);
    _mm256_storeu_si256((__m256i *)exp_avg, _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256((__m256i *)exp_avg_sq, _mm512_extracti64x4_epi64(bytes, 1));
}
