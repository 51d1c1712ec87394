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
#define vi_replace_where_nan(x, otherwise, if_nan)                                                          \
    _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), if_nan)
