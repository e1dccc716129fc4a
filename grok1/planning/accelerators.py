"""GPUs for which programs can be compiled and projected, without having one.

An entry has what XLA's compiler asks of a GPU, and what a projection needs. The numbers, except
those of the L40S, are a subset of those in the file of that GPU in
https://github.com/openxla/xla, xla/backends/gpu/target_config/specs, which XLA reads from such a
GPU. Rates and links are from NVIDIA's data sheets: H100, H200, A100, L40S, and HGX B200.
"""

from __future__ import annotations

import dataclasses

NVLINK, PCIE = "NVLink", "PCIe"


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of GPU.

    name: as its driver reports it. capability: CUDA's compute capability. memory: bytes.
    bandwidth: of its memory, in bytes a second. rate: operations a second of dense bfloat16
    products. link, link_bandwidth: how GPUs of one host are connected, and the bytes a second that
    each can send. cores: streaming multiprocessors. core_threads, core_memory: the most threads,
    and the bytes of shared memory, of one of them. block_memory: the most bytes of shared memory
    of a block. core_units: float32 units of a core. clock: GHz. cache: bytes of the level-2 cache.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float
    rate: float
    link: str
    link_bandwidth: float
    cores: int
    core_threads: int
    core_memory: int
    block_memory: int
    core_units: int
    clock: float
    cache: int

    def limited(self, memory: int | None, bandwidth: float | None) -> Accelerator:
        """Return it with another memory or bandwidth, if given."""
        return dataclasses.replace(
            self, memory=memory or self.memory, bandwidth=bandwidth or self.bandwidth
        )

    def target_config(self) -> str:
        """Return XLA's description of this GPU, a GpuTargetConfigProto as text."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores}
              fpus_per_core: {self.core_units}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: {self.core_threads}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.block_memory}
              shared_memory_per_core: {self.core_memory}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              clock_rate_ghz: {self.clock}
              l2_cache_size: {self.cache}
              memory_bandwidth: {self.bandwidth:.0f}
              device_memory_size: {self.memory}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.name}"
        """


_HOPPER = Accelerator(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    memory=84942979072,
    bandwidth=3.35232e12,
    rate=989e12,
    link=NVLINK,
    link_bandwidth=450e9,
    cores=132,
    core_threads=2048,
    core_memory=233472,
    block_memory=232448,
    core_units=128,
    clock=1.98,
    cache=52428800,
)
_AMPERE = Accelerator(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    memory=85100068864,
    bandwidth=2.03904e12,
    rate=312e12,
    link=NVLINK,
    link_bandwidth=300e9,
    cores=108,
    core_threads=2048,
    core_memory=167936,
    block_memory=166912,
    core_units=64,
    clock=1.41,
    cache=41943040,
)
ACCELERATORS = {
    "h100": _HOPPER,
    "h200": dataclasses.replace(
        _HOPPER, name="NVIDIA H200 141GB HBM3e", memory=151397597184, bandwidth=4.8e12
    ),
    "a100-80gb": _AMPERE,
    "a100-40gb": dataclasses.replace(
        _AMPERE, name="NVIDIA A100-SXM4-40GB", memory=42331013120, bandwidth=1.5552e12
    ),
    "b200": Accelerator(
        name="NVIDIA B200",
        capability=(10, 0),
        memory=191514411008,
        bandwidth=7.67232e12,
        rate=2250e12,
        link=NVLINK,
        link_bandwidth=900e9,
        cores=148,
        core_threads=2048,
        core_memory=233472,
        block_memory=232448,
        core_units=128,
        clock=1.965,
        cache=132644864,
    ),
    # Not among XLA's files. Memory as nvidia-smi reports it, 46,068 MiB; the limits of a core are
    # those of compute capability 8.9 in the CUDA C++ Programming Guide.
    "l40s": Accelerator(
        name="NVIDIA L40S",
        capability=(8, 9),
        memory=46068 << 20,
        bandwidth=864e9,
        rate=362e12,
        link=PCIE,
        link_bandwidth=32e9,
        cores=142,
        core_threads=1536,
        core_memory=102400,
        block_memory=101376,
        core_units=128,
        clock=2.52,
        cache=96 << 20,
    ),
}
