// The host side of CUDA without a card: runtime, driver, cuBLAS, cuDNN and NCCL for the CUDA build of torch.
//
// Kernels do nothing and device memory holds nothing: what is copied to the host is zero. Streams, events, captures and graphs
// are kept as CUDA keeps them, and what CUDA forbids while a stream is captured fails here with the same error. Functions that
// are missing here are made by build.py: they are counted and return success.
#define __CUDART_API_VERSION_INTERNAL
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
using Status = cudaError_t;
using std::string;

// ---- what there is

struct Capture {  // of one or more streams into one graph
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  struct Stream* origin;
  std::set<struct Stream*> others;  // streams that joined
  std::set<struct Stream*> loose;   // those with work that nothing waits for
  std::vector<string> nodes;
  bool open = true, broken = false;
};
struct Stream {
  int device = 0, priority = 0;
  std::shared_ptr<Capture> capture;
};
struct Event {
  std::shared_ptr<Capture> capture;
  Stream* stream = nullptr;
};
struct Graph {
  std::vector<string> nodes;
};
struct Block {
  size_t size;
  int device;  // -1: pinned memory of the host
};

static const size_t MEMORY = 80ull << 30;
static std::recursive_mutex lock_;
#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock_)
static std::unordered_map<const void*, string> kernels;
static std::map<uintptr_t, Block> blocks;
static std::map<string, long> counts;
static std::vector<string> errors, last_graph;
static std::set<std::shared_ptr<Capture>> captures;  // under way
static std::set<Graph*> with_nccl;                   // graphs that can be launched and hold NCCL's work
static size_t used = 0;
static unsigned long long next_id = 1;
static thread_local int device = 0;
static thread_local Status last = cudaSuccess;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static int devices() {
  const char* told = getenv("GPUSIM_DEVICES");
  return told ? atoi(told) : 1;
}

static Stream* at(cudaStream_t s) {
  static Stream defaults[16];
  bool is_default = s == nullptr || s == cudaStreamLegacy || s == cudaStreamPerThread;
  return is_default ? &defaults[device] : (Stream*)s;
}

// ---- the rules

static Status refuse(Status status, const string& what, Capture* capture = nullptr) {
  LOCKED;
  if (capture) capture->broken = true;
  errors.push_back(string(cudaGetErrorName(status)) + " in " + what);
  return last = status;
}

// For calls that may not be made while any capture watches this thread.
static Status outside_captures(const char* what) {
  LOCKED;
  counts[what]++;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto& c : captures) {
    bool watches = c->mode == cudaStreamCaptureModeGlobal ||
                   (c->mode == cudaStreamCaptureModeThreadLocal && c->thread == std::this_thread::get_id());
    if (watches) return refuse(cudaErrorStreamCaptureUnsupported, what, c.get());
  }
  return cudaSuccess;
}
#define OUTSIDE(what) \
  if (Status status = outside_captures(what)) return status

// Work on a stream: a node of the graph, if the stream is captured.
API Status gpusim_work(void* s, const char* what) {
  LOCKED;
  Stream* stream = at((cudaStream_t)s);
  counts[what]++;
  if (Capture* c = stream->capture.get()) {
    if (c->broken) return refuse(cudaErrorStreamCaptureInvalidated, what);
    c->nodes.push_back(what);
    if (stream != c->origin) c->loose.insert(stream);
  }
  return cudaSuccess;
}

static Status wait_for(cudaStream_t s, const char* what) {
  LOCKED;
  counts[what]++;
  Capture* c = at(s)->capture.get();
  return c ? refuse(cudaErrorStreamCaptureUnsupported, what, c) : cudaSuccess;
}

// ---- for the tests

static const char* lines(const std::vector<string>& list) {
  static string out;
  out.clear();
  for (auto& line : list) out += line + "\n";
  return out.c_str();
}
API long gpusim_stub(const char* name) {
  LOCKED;
  counts[string("stub ") + name]++;
  return 0;
}
API void gpusim_reset() {
  LOCKED;
  counts.clear(), errors.clear(), last_graph.clear();
}
API const char* gpusim_errors() { return lines(errors); }
API const char* gpusim_graph() { return lines(last_graph); }
API int gpusim_graphs_with_nccl() { return with_nccl.size(); }
API const char* gpusim_counts() {
  LOCKED;
  std::vector<string> list;
  for (auto& [name, n] : counts) list.push_back(std::to_string(n) + " " + name);
  return lines(list);
}

// ---- kernels

API void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* f, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  LOCKED;
  kernels[f] = string("kernel ") + name;
}
struct Launch { dim3 grid, block; size_t shared; void* stream; };
static thread_local std::vector<Launch> launches;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  launches.push_back({grid, block, shared, stream});
  return 0;
}
API Status __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Launch l = launches.back();
  launches.pop_back();
  *grid = l.grid, *block = l.block, *shared = l.shared, *(void**)stream = l.stream;
  return cudaSuccess;
}
static Status launch(const void* f, cudaStream_t s) {
  auto found = kernels.find(f);
  return gpusim_work(s, found == kernels.end() ? "kernel ?" : found->second.c_str());
}
API Status __cudaGetKernel(void** kernel, const void* f) { *kernel = (void*)f; return cudaSuccess; }
API Status __cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t s) { return launch(f, s); }
API Status cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t s) { return launch(f, s); }
API Status cudaLaunchCooperativeKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t s) { return launch(f, s); }
API Status cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) { return launch(f, c->stream); }
API Status cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) {
  Status status = gpusim_work(s, "host function");
  if (!at(s)->capture) f(data);
  return status;
}
API Status cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
API Status cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { *n = 2; return cudaSuccess; }
API Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}

// ---- devices

API Status cudaGetDeviceCount(int* n) { *n = devices(); return cudaSuccess; }
API Status cudaGetDevice(int* d) { *d = device; return cudaSuccess; }
API Status cudaSetDevice(int d) {
  if (d < 0 || d >= devices()) return refuse(cudaErrorInvalidDevice, "cudaSetDevice");
  device = d;
  return cudaSuccess;
}
API Status cudaDeviceSynchronize() { OUTSIDE("cudaDeviceSynchronize"); return cudaSuccess; }
API Status cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; return cudaSuccess; }
API Status cudaDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d); return cudaSuccess; }
API Status cudaDeviceGetStreamPriorityRange(int* low, int* high) { *low = 0, *high = -5; return cudaSuccess; }
API Status cudaDriverGetVersion(int* v) { *v = CUDART_VERSION; return cudaSuccess; }
API Status cudaRuntimeGetVersion(int* v) { *v = CUDART_VERSION; return cudaSuccess; }
API Status cudaMemGetInfo(size_t* left, size_t* total) { *total = MEMORY, *left = MEMORY - used; return cudaSuccess; }
API Status cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Simulated GPU");
  p->major = 9, p->multiProcessorCount = 132, p->totalGlobalMem = MEMORY, p->warpSize = 32, p->pciBusID = d;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 49152, p->sharedMemPerMultiprocessor = 233472, p->sharedMemPerBlockOptin = 232448;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32, p->l2CacheSize = 50 << 20, p->memoryBusWidth = 5120, p->textureAlignment = 512;
  p->cooperativeLaunch = p->concurrentKernels = p->unifiedAddressing = 1;
  return cudaSuccess;
}
API Status cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrComputeCapabilityMajor, 9}, {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrWarpSize, 32}, {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152}, {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448}, {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrClockRate, 1980000}, {cudaDevAttrMemoryClockRate, 2619000}, {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrL2CacheSize, 50 << 20}, {cudaDevAttrMaxGridDimX, 2147483647}, {cudaDevAttrMaxGridDimY, 65535}};
  auto found = known.find(a);
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}
API Status cudaGetLastError() { Status status = last; last = cudaSuccess; return status; }
API Status cudaPeekAtLastError() { return last; }
API const char* cudaGetErrorName(Status e) {
  switch (e) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    default: return "cudaError";
  }
}
API const char* cudaGetErrorString(Status e) {
  if (e == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  if (e == cudaErrorMemoryAllocation) return "out of memory";
  return cudaGetErrorName(e);
}

// ---- memory: addresses alone

static Status reserve(void** p, size_t size, int where) {
  LOCKED;
  if (where >= 0 && used + size > MEMORY) return last = cudaErrorMemoryAllocation;
  size = (size + 4095) & ~4095ull;
  *p = mmap(nullptr, size, where < 0 ? PROT_READ | PROT_WRITE : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  blocks[(uintptr_t)*p] = {size, where};
  if (where >= 0) used += size;
  return cudaSuccess;
}
static Status release(void* p) {
  LOCKED;
  auto found = blocks.find((uintptr_t)p);
  if (found == blocks.end()) return cudaSuccess;
  if (found->second.device >= 0) used -= found->second.size;
  munmap(p, found->second.size);
  blocks.erase(found);
  return cudaSuccess;
}
static const Block* block_of(const void* p) {
  LOCKED;
  auto after = blocks.upper_bound((uintptr_t)p);
  if (after == blocks.begin()) return nullptr;
  auto& [start, block] = *--after;
  return (uintptr_t)p < start + block.size ? &block : nullptr;
}
static bool on_device(const void* p) {
  const Block* b = block_of(p);
  return b && b->device >= 0;
}
API Status cudaMalloc(void** p, size_t n) { OUTSIDE("cudaMalloc"); return reserve(p, n, device); }
API Status cudaFree(void* p) { if (!p) return cudaSuccess; OUTSIDE("cudaFree"); return release(p); }
API Status cudaHostAlloc(void** p, size_t n, unsigned) { OUTSIDE("cudaHostAlloc"); return reserve(p, n, -1); }
API Status cudaFreeHost(void* p) { return release(p); }
API Status cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  const Block* b = block_of(p);
  a->type = !b ? cudaMemoryTypeUnregistered : b->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->device = b && b->device >= 0 ? b->device : device;
  a->devicePointer = b ? (void*)p : nullptr, a->hostPointer = b && b->device < 0 ? (void*)p : nullptr;
  return cudaSuccess;
}
// The exception: DistributedDataParallel sends its plans through the GPU and reads them back. What was copied to the device
// and then handed over by NCCL to the only process there is comes back as it was.
static std::map<const void*, string> uploaded, handed_over;
static void arrive(void* to, const void* from, size_t n) {
  LOCKED;
  auto found = handed_over.find(from);
  bool known = found != handed_over.end() && found->second.size() >= n;
  if (!on_device(to)) {
    if (!on_device(from)) memcpy(to, from, n);
    else if (known) memcpy(to, found->second.data(), n);
    else memset(to, 0, n);
  } else if (!on_device(from)) {
    if (n <= 1 << 16) uploaded[to] = string((const char*)from, n);
  } else if (known) {
    handed_over[to] = string(found->second);
  }
}
static int hand_over(const void* from, void* to, void* s, const char* what) {
  LOCKED;
  if (uploaded.count(from)) handed_over[to] = uploaded[from];
  return gpusim_work(s, what);
}
API Status cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  OUTSIDE("cudaMemcpy");
  arrive(to, from, n);
  return cudaSuccess;
}
API Status cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  bool within = on_device(to) && on_device(from);
  if (Status status = gpusim_work(s, within ? "copy" : on_device(to) ? "copy to device" : "copy to host")) return status;
  bool captured = at(s)->capture != nullptr;  // CUDA allows it, but replays would copy from or to what is there by then
  if (captured && !within) errors.push_back("a captured copy between host and device");
  if (!captured) arrive(to, from, n);
  return cudaSuccess;
}
API Status cudaMemcpyPeerAsync(void*, int, const void*, int, size_t, cudaStream_t s) { return gpusim_work(s, "copy"); }
API Status cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t s) {
  return gpusim_work(s, "copy");
}
API Status cudaMemset(void*, int, size_t) { OUTSIDE("cudaMemset"); return cudaSuccess; }
API Status cudaMemsetAsync(void*, int, size_t, cudaStream_t s) { return gpusim_work(s, "memset"); }

// ---- streams and events

API Status cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int priority) {
  *s = (cudaStream_t) new Stream{device, priority};
  return cudaSuccess;
}
API Status cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { return cudaStreamCreateWithPriority(s, f, 0); }
API Status cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API Status cudaStreamGetPriority(cudaStream_t s, int* p) { *p = at(s)->priority; return cudaSuccess; }
API Status cudaStreamGetDevice(cudaStream_t s, int* d) { *d = at(s)->device; return cudaSuccess; }
API Status cudaStreamQuery(cudaStream_t s) { return wait_for(s, "cudaStreamQuery"); }
API Status cudaStreamSynchronize(cudaStream_t s) { return wait_for(s, "cudaStreamSynchronize"); }
API Status cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = (cudaEvent_t) new Event; return cudaSuccess; }
API Status cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API Status cudaEventDestroy(cudaEvent_t e) { delete (Event*)e; return cudaSuccess; }
API Status cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  LOCKED;
  *(Event*)e = {at(s)->capture, at(s)};
  return cudaSuccess;
}
API Status cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
static Status ask(cudaEvent_t e, const char* what) {
  Capture* c = ((Event*)e)->capture.get();
  if (c && c->open) return refuse(cudaErrorCapturedEvent, what, c);
  return outside_captures(what);
}
API Status cudaEventQuery(cudaEvent_t e) { return ask(e, "cudaEventQuery"); }
API Status cudaEventSynchronize(cudaEvent_t e) { return ask(e, "cudaEventSynchronize"); }
API Status cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 0.1f; return cudaSuccess; }
API Status cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  LOCKED;
  Stream* stream = at(s);
  Event* event = (Event*)e;
  Capture* c = event->capture.get();
  if (c && c->open) {  // the stream joins the capture, or waits for another that did
    if (s == nullptr) return refuse(cudaErrorStreamCaptureImplicit, "a wait of the default stream", c);
    if (!stream->capture) {
      stream->capture = event->capture;
      c->others.insert(stream), c->loose.insert(stream);
    }
    if (event->stream != stream) c->loose.erase(event->stream);
  } else if (!c && stream->capture && event->stream) {
    return refuse(cudaErrorStreamCaptureIsolation, "a wait for work from outside", stream->capture.get());
  }
  return cudaSuccess;
}

// ---- captures and graphs

API Status cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  LOCKED;
  if (s == nullptr) return refuse(cudaErrorStreamCaptureUnsupported, "a capture of the default stream");
  at(s)->capture = std::make_shared<Capture>(Capture{next_id++, mode, std::this_thread::get_id(), at(s)});
  captures.insert(at(s)->capture);
  return cudaSuccess;
}
API Status cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  LOCKED;
  *graph = nullptr;
  auto c = at(s)->capture;
  if (!c) return refuse(cudaErrorIllegalState, "cudaStreamEndCapture");
  c->open = false;
  captures.erase(c);
  for (Stream* other : c->others) other->capture = nullptr;
  at(s)->capture = nullptr;
  if (c->broken) return refuse(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
  if (!c->loose.empty()) return refuse(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture");
  last_graph = c->nodes;
  *graph = (cudaGraph_t) new Graph{c->nodes};
  return cudaSuccess;
}
API Status cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* n) {
  LOCKED;
  Capture* c = at(s)->capture.get();
  *status = !c ? cudaStreamCaptureStatusNone
            : c->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (c && id) *id = c->id;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API Status cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(s, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
API Status cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { std::swap(thread_mode, *mode); return cudaSuccess; }
API Status cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) { *n = ((Graph*)g)->nodes.size(); return cudaSuccess; }
API Status cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t from, unsigned long long) {
  OUTSIDE("cudaGraphInstantiate");
  auto* graph = new Graph(*(Graph*)from);
  for (auto& node : graph->nodes)
    if (node.rfind("nccl", 0) == 0) with_nccl.insert(graph);
  *made = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
API Status cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t from, unsigned long long f) {
  return cudaGraphInstantiateWithFlags(made, from, f);
}
API Status cudaGraphLaunch(cudaGraphExec_t, cudaStream_t s) { return gpusim_work(s, "graph"); }
API Status cudaGraphDestroy(cudaGraph_t g) { delete (Graph*)g; return cudaSuccess; }
API Status cudaGraphExecDestroy(cudaGraphExec_t g) {
  OUTSIDE("cudaGraphExecDestroy");
  with_nccl.erase((Graph*)g);
  delete (Graph*)g;
  return cudaSuccess;
}

// ---- the driver, as torch and Triton use it

struct Function { string name; };
static int context_;
API int cuDriverGetVersion(int* v) { *v = CUDART_VERSION; return 0; }
API int cuDeviceGetCount(int* n) { *n = devices(); return 0; }
API int cuDeviceGet(int* d, int i) { *d = i; return 0; }
API int cuDeviceGetAttribute(int* v, int a, int d) { return cudaDeviceGetAttribute(v, (cudaDeviceAttr)a, d); }
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { if (flags) *flags = 0; *active = 1; return 0; }
API int cuDevicePrimaryCtxRetain(void** c, int) { *c = &context_; return 0; }
API int cuCtxGetCurrent(void** c) { *c = &context_; return 0; }
API int cuCtxGetDevice(int* d) { *d = device; return 0; }
API int cuGetErrorString(int, const char** s) { *s = "error of the driver"; return 0; }
API int cuModuleLoadData(void** m, const void*) { *m = &context_; return 0; }
API int cuModuleGetFunction(void** f, void*, const char* name) { *f = new Function{string("triton ") + name}; return 0; }
API int cuFuncGetAttribute(int* v, int a, void*) { *v = a == 0 ? 1024 : 0; return 0; }  // 0: threads in a block
API int cuPointerGetAttribute(void* v, int, unsigned long p) { *(unsigned long*)v = p; return 0; }
API int cuLaunchKernelEx(const void* config, void* f, void**, void**) {
  return gpusim_work(*(void**)((char*)config + 32), ((Function*)f)->name.c_str());
}
API int cuLaunchKernel(void* f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* s, void**, void**) {
  return gpusim_work(s, ((Function*)f)->name.c_str());
}
static long nothing() { return 0; }
API Status cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                            cudaDriverEntryPointQueryResult* found) {
  static const std::map<string, void*> known = {{"cuDevicePrimaryCtxGetState", (void*)cuDevicePrimaryCtxGetState},
                                                {"cuCtxGetCurrent", (void*)cuCtxGetCurrent},
                                                {"cuGetErrorString", (void*)cuGetErrorString}};
  if (found) *found = cudaDriverEntryPointSuccess;
  auto it = known.find(name);
  *f = it == known.end() ? (void*)nothing : it->second;
  return cudaSuccess;
}
API Status cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long, cudaDriverEntryPointQueryResult* found) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, 0, found);
}

// ---- cuBLAS, cuDNN and NCCL

struct Handle { void* stream = nullptr; };
static int make(void** p) { *p = calloc(1, 256); return 0; }
#define WORK(name) API int name(Handle* h) { return gpusim_work(h->stream, #name); }
API int cublasCreate_v2(Handle** h) { *h = new Handle; return 0; }
API int cublasSetStream_v2(Handle* h, void* s) { h->stream = s; return 0; }
API int cublasGetStream_v2(Handle* h, void** s) { *s = h->stream; return 0; }
API int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
API const char* cublasGetStatusString(int) { return "an error of cuBLAS"; }
WORK(cublasSgemm_v2) WORK(cublasGemmEx) WORK(cublasSgemmStridedBatched) WORK(cublasGemmStridedBatchedEx) WORK(cublasSgemv_v2)
API int cublasLtCreate(void** h) { return make(h); }
API int cublasLtMatmulDescCreate(void** p, int, int) { return make(p); }
API int cublasLtMatmulPreferenceCreate(void** p) { return make(p); }
API int cublasLtMatrixLayoutCreate(void** p, int, unsigned long, unsigned long, long) { return make(p); }
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* n) {
  memset(result, 0, 80);
  *n = 1;
  return 0;
}
API int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, size_t,
                       void* s) {
  return gpusim_work(s, "cublasLtMatmul");
}
API int cudnnCreate(Handle** h) { *h = new Handle; return 0; }
API int cudnnSetStream(Handle* h, void* s) { h->stream = s; return 0; }
API int cudnnGetStream(Handle* h, void** s) { *s = h->stream; return 0; }
API size_t cudnnGetVersion() { return 91900; }
API const char* cudnnGetErrorString(int) { return "an error of cuDNN"; }
API int cudnnCreateTensorDescriptor(void** p) { return make(p); }
API int cudnnCreateActivationDescriptor(void** p) { return make(p); }
API int cudnnCreateFilterDescriptor(void** p) { return make(p); }
API int cudnnCreateConvolutionDescriptor(void** p) { return make(p); }
static int bytes(size_t* n) { *n = 1 << 16; return 0; }
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, size_t* n) {
  return bytes(n);
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*,
                                                          size_t* n) {
  return bytes(n);
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* n) { return bytes(n); }
WORK(cudnnBatchNormalizationForwardTrainingEx) WORK(cudnnBatchNormalizationForwardInference)
WORK(cudnnBatchNormalizationBackwardEx) WORK(cudnnBackendExecute)
API int cudnnBackendCreateDescriptor(int, void** p) { return make(p); }
API int cudnnBackendGetAttribute(void*, int, int type, long wanted, long* count, void* out) {
  enum { INT64 = 3, NUMERICAL_NOTE = 11, DESCRIPTOR = 15, BEHAVIOR_NOTE = 19 };  // of cudnnBackendAttributeType_t
  bool notes = type == NUMERICAL_NOTE || type == BEHAVIOR_NOTE;
  if (out && wanted > 0 && !notes && type != DESCRIPTOR) memset(out, 0, type == INT64 ? 8 : 4);
  if (count) *count = notes ? 0 : 1;  // one engine, one plan, without a workspace
  return 0;
}
API int ncclGetVersion(int* v) { *v = 22809; return 0; }
API const char* ncclGetErrorString(int) { return "an error of NCCL"; }
API const char* ncclGetLastError(void*) { return ""; }
struct NcclId { char bytes[128]; };
API int ncclCommInitRank(void** c, int, NcclId, int) { return make(c); }
API int ncclCommInitRankConfig(void** c, int, NcclId, int, void*) { return make(c); }
API int ncclCommGetAsyncError(void*, int* e) { *e = 0; return 0; }
API int ncclCommCount(void*, int* n) { *n = 1; return 0; }
API int ncclAllReduce(const void*, void*, size_t, int, int, void*, void* s) { return gpusim_work(s, "ncclAllReduce"); }
API int ncclBroadcast(const void* from, void* to, size_t, int, int, void*, void* s) {
  return hand_over(from, to, s, "ncclBroadcast");
}
API int ncclBcast(void* p, size_t, int, int, void*, void* s) { return hand_over(p, p, s, "ncclBcast"); }
API int ncclAllGather(const void* from, void* to, size_t, int, void*, void* s) {
  return hand_over(from, to, s, "ncclAllGather");
}
API int ncclCommDestroy(void*) {  // NCCL waits for the graphs that hold its work
  if (!with_nccl.empty()) refuse(cudaErrorIllegalState, "ncclCommDestroy: a graph with NCCL's work lives, it waits for ever");
  return 0;
}
