// What the GEMM kernels for Hopper share: copies by the tensor memory accelerator, the
// ring of shared-memory stages, descriptors of wgmma operands, the walk over tiles.  No
// header is included.  The text stands behind the constants CONSUMERS, CLUSTER, STAGES.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

struct __align__(64) TensorMap { u64 opaque[16]; };  // CUtensorMap

#define DEVICE static __device__ __forceinline__

// ---- shared memory

DEVICE u32 shared_address(const void* p) {
  u32 a;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
  return a;
}
DEVICE u32 load_shared(u32 address) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
// Four 8 x 8 matrices of 16-bit values; lane l addresses row l % 8 of matrix l / 8.
DEVICE void store_matrices(u32 address, const u32 (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3]) : "memory");
}
// All threads of a consumer warpgroup meet.
DEVICE void group_sync(u32 group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// ---- barriers, of which every stage has two

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier), "r"(phase) : "memory");
}
// No .release.cluster here: it compiles to a full memory fence, which waits for every
// load in flight and halves the speed of the main loop.  What reads the stage is wgmma,
// whose end wgmma.wait_group has seen, and loads of metadata, which wgmma has used.
DEVICE void barrier_arrive_at(u32 barrier, u32 cta) {
  asm volatile(
      "{\n.reg .b32 r;\nmapa.shared::cluster.u32 r, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [r];\n}" ::"r"(barrier), "r"(cta) : "memory");
}
// One producer fills a stage; every warp of every consumer in the cluster empties it.
DEVICE void begin(u32 thread, u32 full, u32 empty) {
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, 4 * CONSUMERS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// A CTA must not leave while the other may still write to it or arrive at its barriers.
DEVICE void end() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

struct Ring {
  int stage;
  u32 phase;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) { stage = 0; phase ^= 1; }
  }
};

// ---- copies

DEVICE void tma_load(u32 to, const TensorMap* map, u32 barrier, int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(inner), "r"(outer) : "memory");
}
// Into the same place of every CTA of the cluster.
DEVICE void tma_share(u32 to, const TensorMap* map, u32 barrier, int inner, int outer) {
  if (CLUSTER == 1) return tma_load(to, map, barrier, inner, outer);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
      ::"r"(to), "l"(map), "r"(barrier), "r"(inner), "r"(outer),
        "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
DEVICE void tma_store(const TensorMap* map, u32 from, int inner, int outer) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(from), "r"(inner), "r"(outer) : "memory");
}

// ---- multiplication

// Strides in bytes; the swizzle is 1 for 128 bytes, 2 for 64.
DEVICE u64 descriptor(u32 address, u32 leading, u32 stride, u32 swizzle) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 |
         (u64)(stride >> 4) << 32 | (u64)swizzle << 62;
}
DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT> DEVICE void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

// ---- tiles

DEVICE u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Clusters go through the tiles in groups of GROUP rows of clusters: the rows of the one
// operand and the columns of the other that are in use at a time stay in L2.
template <int GROUP>
DEVICE void locate(int tile, int rows, int columns, u32 rank, int& row, int& column) {
  int per_group = GROUP * columns, group = tile / per_group, first = group * GROUP;
  int height = rows - first < GROUP ? rows - first : GROUP, inside = tile - group * per_group;
  row = (first + inside % height) * CLUSTER + (int)rank;
  column = inside / height;
}
