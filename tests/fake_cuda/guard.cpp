// Tells a CPU build of PyTorch that there is one CUDA device, on which nothing ever runs.
//
// Fake tensors and the autograd engine ask the device guard for streams and the hooks for a count; both answer here.
// No memory is ever allocated on the device: only fake tensors may be made on it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace tokscale_tests {

constexpr c10::DeviceType kDevice = c10::DeviceType::CUDA;

struct IdleGuard final : c10::impl::NoOpDeviceGuardImpl<kDevice> {
  static c10::Device only() { return {kDevice, 0}; }
  static c10::Stream idle() { return c10::Stream(c10::Stream::DEFAULT, only()); }

  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return only(); }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }

  c10::Stream getStream(c10::Device) const noexcept override { return idle(); }
  c10::Stream getDefaultStream(c10::Device) const override { return idle(); }
  c10::Stream getNewStream(c10::Device, int) const override { return idle(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return idle(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return idle(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int recorded;
    *event = &recorded;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)

}  // namespace tokscale_tests

namespace at {

// The registry creates the hooks by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
