import enum


class PlatformEnum(enum.Enum):
    CUDA = enum.auto()
    CPU = enum.auto()
    UNSPECIFIED = enum.auto()


class Platform:
    _enum = PlatformEnum.UNSPECIFIED
    device_name = ""
    device_type = ""

    def is_cpu(self) -> bool:
        return self._enum is PlatformEnum.CPU

    def is_cuda(self) -> bool:
        return self._enum is PlatformEnum.CUDA

    def is_unspecified(self) -> bool:
        return self._enum is PlatformEnum.UNSPECIFIED


class CpuPlatform(Platform):
    _enum, device_name, device_type = PlatformEnum.CPU, "cpu", "cpu"


class CudaPlatform(Platform):
    _enum, device_name, device_type = PlatformEnum.CUDA, "cuda", "cuda"


class UnspecifiedPlatform(Platform):
    pass
