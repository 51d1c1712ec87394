/* 16 lanes: AVX-512 F, BW, DQ and VL. */
#define ISA(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
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
