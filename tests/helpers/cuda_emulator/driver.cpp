// A CUDA driver that runs nothing: it keeps what it is called with, and fails where it is told to.
#include <cuda.h>

#include <cstring>
#include <string>

static std::string failing;  // the function that fails next
static char calls[4096], description[512];
static CUcontext current;

static CUresult called(const char* name) {
  std::strcat(std::strcat(calls, name), " ");
  return failing == name ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

extern "C" {
const char* driver_calls() { return calls; }
const char* driver_launch() { return description; }
void driver_reset(const char* fail) {
  failing = fail;
  calls[0] = description[0] = 0;
  current = nullptr;
}
CUresult CUDAAPI cuDriverGetVersion(int* version) { return *version = 12040, CUDA_SUCCESS; }
CUresult CUDAAPI cuGetErrorName(CUresult code, const char** name) {
  *name = code == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "another";
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorString(CUresult, const char** text) {
  return *text = "invalid argument", CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  return *device = ordinal + 40, called("cuDeviceGet");
}
CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const bool right = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
  *value = right ? 1000 + device : 0;
  return called("cuDeviceGetAttribute");
}
CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
  return *context = current, called("cuCtxGetCurrent");
}
CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  return *device = static_cast<int>(reinterpret_cast<size_t>(current)) - 1, called("cuCtxGetDevice");
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<size_t>(device) + 1);
  return called("cuDevicePrimaryCtxRetain");
}
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  return current = context, called("cuCtxSetCurrent");
}
CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
  return called("cuModuleLoadData");
}
CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = reinterpret_cast<CUfunction>(const_cast<char*>(name));
  return std::memcmp(module, "\x7f" "ELF", 4) ? CUDA_ERROR_INVALID_VALUE
                                            : called("cuModuleGetFunction");
}
CUresult CUDAAPI cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
  const bool right = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value == 98304;
  return right ? called("cuFuncSetAttribute") : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction, void** arguments, void**) {
  std::string text;
  for (unsigned n : {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                     c->blockDimZ, c->sharedMemBytes, c->numAttrs})
    text += std::to_string(n) + " ";
  text += std::to_string(reinterpret_cast<size_t>(c->hStream));
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      text += " pdl=" + std::to_string(c->attrs[i].value.programmaticStreamSerializationAllowed);
  text += " " + std::to_string(*static_cast<int*>(arguments[0]));
  std::strcpy(description, text.c_str());
  return called("cuLaunchKernelEx");
}
size_t driver_sizes(int i) { return i ? sizeof(CUlaunchAttribute) : sizeof(CUlaunchConfig); }
}
