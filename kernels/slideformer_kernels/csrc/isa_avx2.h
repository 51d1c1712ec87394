/* 8 lanes: AVX2 with FMA. */
#define ISA(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define VECTORS 1
#define SQUARED_CODE_UNIT 1.0f
#define VF __m256
#define VI __m256i
#define FINISH(name) name##_portable(args, begin, end)
#define PREFETCH_NUMEL 512
#define prefetch(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)

TARGET INLINE uint32_t highest_u32_avx2(__m256i a)
{
    __m128i x = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4E));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xB1));
    return (uint32_t)_mm_cvtsi128_si32(x);
}

#define vf_set1(x) _mm256_set1_ps(x)
#define vf_load(p) _mm256_loadu_ps(p)
#define vf_store(p, x) _mm256_storeu_ps(p, x)
#define vf_add(a, b) _mm256_add_ps(a, b)
#define vf_sub(a, b) _mm256_sub_ps(a, b)
#define vf_mul(a, b) _mm256_mul_ps(a, b)
#define vf_div(a, b) _mm256_div_ps(a, b)
#define vf_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define vf_sqrt(a) _mm256_sqrt_ps(a)
#define vf_bits(x) _mm256_castps_si256(x)
#define vf_of_bits(x) _mm256_castsi256_ps(x)

#define vi_set1(x) _mm256_set1_epi32((int)(x))
#define vi_add(a, b) _mm256_add_epi32(a, b)
#define vi_sub(a, b) _mm256_sub_epi32(a, b)
#define vi_shift_left_16(a) _mm256_slli_epi32(a, 16)
#define vi_shift_right_16(a) _mm256_srli_epi32(a, 16)
#define vi_load_u16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define vi_load_i16(p) _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(p)))
/* The values are within the range of the type, so the packs' saturation does not come into play. */
#define vi_store_u16(p, x)                                                                                  \
    _mm_storeu_si128((__m128i *)(p),                                                                        \
                     _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)))
#define vi_store_i16(p, x)                                                                                  \
    _mm_storeu_si128((__m128i *)(p),                                                                        \
                     _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)))
#define vi_store_i8(p, x)                                                                                   \
    _mm_storel_epi64((__m128i *)(p),                                                                        \
                     _mm_packs_epi16(_mm_packs_epi32(_mm256_castsi256_si128(x),                             \
                                                     _mm256_extracti128_si256(x, 1)),                       \
                                     _mm_setzero_si128()))
#define vi_store_u8(p, x)                                                                                   \
    _mm_storel_epi64((__m128i *)(p),                                                                        \
                     _mm_packus_epi16(_mm_packs_epi32(_mm256_castsi256_si128(x),                            \
                                                      _mm256_extracti128_si256(x, 1)),                      \
                                      _mm_setzero_si128()))
/* In range of int32; rounds as MXCSR says, which is to nearest even here. */
#define vi_round(x) _mm256_cvtps_epi32(x)
#define vf_of_int(a) _mm256_cvtepi32_ps(a)
#define vi_and(a, b) _mm256_and_si256(a, b)
#define vi_shift_right(a, bits) _mm256_srli_epi32(a, bits)
#define vi_negate_where_negative(a, x) _mm256_sign_epi32(x, a) /* and 0 where a is */
#define vi_max_u32(a, b) _mm256_max_epu32(a, b)
#define vi_min_u32(a, b) _mm256_min_epu32(a, b)
#define vi_highest_u32(a) highest_u32_avx2(a)
#define vi_load_i8(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define vi_load_u8(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define vi_replace_where_nan(x, otherwise, if_nan)                                                          \
    _mm256_blendv_epi8(otherwise, if_nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)))
