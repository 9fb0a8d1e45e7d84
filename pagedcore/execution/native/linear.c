/* Linear layers: rows times a weight that was packed once.

       T rows   N outputs   P = ceil(N / 32) panels   I inputs, even

       x        [T, I]
       weight   [N, I]
       packed   [P, I / 2, 32]  pairs: inputs 2i and 2i + 1 of output 32 p + n; zeros behind N
       out      [T, N]          bfloat16 or float

   Few rows are bound by reading `packed`, once, from front to back. Of many, a chunk of rows stays
   in the second-level cache while all panels pass by, and a panel while the chunk's rows do. */

#include "panels.h"

typedef struct {
    const bf16 *weight;
    long outputs, inputs;
    uint32_t *packed;
} Packing;

static void pack_panel(void *context, long panel) {
    const Packing *p = context;
    long pairs = p->inputs / 2;
    uint32_t *to = p->packed + panel * pairs * WIDTH;
    for (long i = 0; i < pairs; i += 16)
        for (int group = 0; group < WIDTH; group += 16) {
            __m512i square[16];
            for (int n = 0; n < 16; n++) {
                long output = panel * WIDTH + group + n;
                const uint32_t *from = (const uint32_t *)(p->weight + output * p->inputs) + i;
                __mmask16 mask = output < p->outputs ? lanes(pairs - i) : 0;
                square[n] = _mm512_maskz_loadu_epi32(mask, from);
            }
            transpose16(square);
            for (long j = 0; j < 16 && i + j < pairs; j++)
                _mm512_storeu_si512(to + (i + j) * WIDTH + group, square[j]);
        }
}

EXPORT void pagedcore_pack(const bf16 *weight, long outputs, long inputs, uint32_t *packed) {
    Packing packing = {weight, outputs, inputs, packed};
    pagedcore_share(pack_panel, &packing, (outputs + WIDTH - 1) / WIDTH);
}

typedef struct {
    const uint32_t *x;
    long rows, pairs;
    const uint32_t *packed;
    long outputs;
    const bf16 *bias;
    char *out;
    int is_float;
    long panels, tiles, grain;
} Product;

/* Tile c * panels + p is panel p for the rows of chunk c; a task is `grain` tiles. */
static void multiply_tiles(void *context, long task) {
    const Product *p = context;
    long end = (task + 1) * p->grain < p->tiles ? (task + 1) * p->grain : p->tiles;
    for (long tile = task * p->grain; tile < end; tile++) {
        long first = tile / p->panels * CHUNK, panel = tile % p->panels, column = panel * WIDTH;
        long count = p->rows - first < CHUNK ? p->rows - first : CHUNK;
        rows_times_panel(count, p->x + first * p->pairs, p->pairs,
                         p->packed + panel * p->pairs * WIDTH, p->pairs,
                         p->bias ? p->bias + column : 0,
                         p->out + (first * p->outputs + column) * (p->is_float ? 4 : 2),
                         p->is_float, p->outputs, p->outputs - column);
    }
}

EXPORT void pagedcore_linear(const bf16 *x, long rows, long inputs, const uint32_t *packed,
                             long outputs, const bf16 *bias, void *out, int is_float) {
    long panels = (outputs + WIDTH - 1) / WIDTH;
    long tiles = (rows + CHUNK - 1) / CHUNK * panels;
    long cost = inputs / 2 * (rows < 8 ? 8 : rows < CHUNK ? rows : CHUNK); /* of a tile */
    long tasks = pagedcore_num_tasks(tiles * cost, LEAST);
    Product product = {(const uint32_t *)x, rows, inputs / 2, packed, outputs, bias, out, is_float,
                       panels, tiles, (tiles + tasks - 1) / tasks};
    if (tiles == 0) return;
    pagedcore_share(multiply_tiles, &product, (tiles + product.grain - 1) / product.grain);
}
