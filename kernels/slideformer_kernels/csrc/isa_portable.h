/* One lane in plain C; the compiler vectorises the loops where the architecture allows (NEON, for one). */
#define ISA(name) name##_portable
#define TARGET
#define LANES 1
#define VECTORS 1
#define SQUARED_CODE_UNIT 1.0f
#define VF float
#define VI uint32_t
#define FINISH(name) (void)begin
#define PREFETCH_NUMEL 0
#define prefetch(address) (void)(address)

#define vf_set1(x) (x)
#define vf_load(p) (*(p))
#define vf_store(p, x) (*(p) = (x))
#define vf_add(a, b) ((a) + (b))
#define vf_sub(a, b) ((a) - (b))
#define vf_mul(a, b) ((a) * (b))
#define vf_div(a, b) ((a) / (b))
#define vf_fma(a, b, c) fma_float(a, b, c)
#define vf_sqrt(a) __builtin_sqrtf(a)
#define vf_bits(x) bits_of(x)
#define vf_of_bits(x) float_of(x)

#define vi_set1(x) ((uint32_t)(x))
#define vi_add(a, b) ((a) + (b))
#define vi_sub(a, b) ((a) - (b))
#define vi_shift_left_16(a) ((a) << 16)
#define vi_shift_right_16(a) ((a) >> 16)
#define vi_load_u16(p) ((uint32_t)*(p))
#define vi_load_i16(p) ((uint32_t)(int32_t)*(p))
#define vi_store_u16(p, x) (*(p) = (uint16_t)(x))
#define vi_store_i16(p, x) (*(p) = (int16_t)(x))
/* Within 2**22: the sum has no fraction bits, and its lowest bits are the integer in two's complement. */
#define vi_round(x) (bits_of((x) + 0x1.8p23f) - 0x4B400000u)
#define vf_of_int(a) ((float)(int32_t)(a))
#define vi_and(a, b) ((a) & (b))
#define vi_shift_right(a, bits) ((a) >> (bits))
#define vi_negate_where_negative(a, x) ((a) >> 31 ? -(x) : (x))
#define vi_max_u32(a, b) ((a) > (b) ? (a) : (b))
#define vi_min_u32(a, b) ((a) < (b) ? (a) : (b))
#define vi_highest_u32(a) (a)
#define vi_load_i8(p) ((uint32_t)(int32_t)*(p))
#define vi_load_u8(p) ((uint32_t)*(p))
#define vi_store_i8(p, x) (*(p) = (int8_t)(x))
#define vi_store_u8(p, x) (*(p) = (uint8_t)(x))
#define vi_replace_where_nan(x, otherwise, if_nan) ((x) != (x) ? (if_nan) : (otherwise))
