// ONNX Runtime's operator dspfx::Chain: a program of native.cpp as one node of an ONNX file.
//
//     Chain(program int32[P], weights float[W], layout int64[L], images...) -> results...
//
// layout: format, LANES of the program, first step, floats of workspace, threads (0: as many as the processor has),
// multiply-adds of an image, numbers of images and results, then of each image and each result the number of its axes
// behind the batch and their sizes. All of it is made by dspfx/deploy/onnx_chains.py.
//
// ONNX Runtime is met through its C ABI alone: a table of functions and a struct of callbacks, whose orders never
// change. Those that are used are numbered here, so that nobody needs its headers.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#define CALL __stdcall
#else
#define EXPORT __attribute__((visibility("default")))
#define CALL
#endif

extern "C" {
int32_t dspfx_lanes();
int32_t dspfx_is_safe(const int32_t* program, int64_t length, int64_t first, int64_t weights, int64_t floats,
                      const int64_t* input_sizes, int64_t inputs, const int64_t* output_sizes, int64_t outputs);
void dspfx_run_in(const int32_t* program, int64_t first, const float* weights, float* work, const float* const* inputs,
                  float* const* outputs, const int64_t* input_sizes, const int64_t* output_sizes, int64_t images,
                  int32_t threads, void (*parallel)(void* pool, void (*work)(void*, size_t), size_t count, void* job),
                  void* pool);
}

namespace {

// ------------------------------------------------------------------------------------- what is used of the C ABI

struct Status {};  // thrown by place, never looked into
struct Value;
struct Info;
struct Kernel;   // OrtKernelContext
struct Domain;
struct Options;  // OrtSessionOptions

typedef void (*Function)();
typedef const Function* Api;  // the table, from its start

struct ApiBase {
    Api(CALL* get_api)(uint32_t version);
    const char*(CALL* get_version)();
};

constexpr uint32_t API_VERSION = 17;  // the first with threads for operators: ONNX Runtime 1.17

enum Place {  // of a function in the table
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    ADD_TO_DOMAIN = 27,
    ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    AXIS_COUNT = 61,
    AXES = 62,
    TENSOR_INFO = 65,
    INPUT_COUNT = 88,
    OUTPUT_COUNT = 89,
    INPUT = 90,
    OUTPUT = 91,
    RELEASE_TENSOR_INFO = 99,
    PARALLEL_FOR = 274,
};

template <typename R, typename... A>
R call(Api api, Place place, A... arguments) {
    return reinterpret_cast<R(CALL*)(A...)>(api[place])(arguments...);
}

enum { FAIL = 1, INVALID_ARGUMENT = 2 };                  // OrtErrorCode
enum { FLOAT = 1, INT32 = 6, INT64 = 7 };                 // ONNXTensorElementDataType
enum { REQUIRED = 0, VARIADIC = 2 };                      // OrtCustomOpInputOutputCharacteristic

struct Op {
    uint32_t version;
    void*(CALL* create)(const Op*, Api, const Info*);
    const char*(CALL* name)(const Op*);
    const char*(CALL* provider)(const Op*);
    int(CALL* input_type)(const Op*, size_t);
    size_t(CALL* input_count)(const Op*);
    int(CALL* output_type)(const Op*, size_t);
    size_t(CALL* output_count)(const Op*);
    void(CALL* compute)(void*, Kernel*);
    void(CALL* destroy)(void*);
    int(CALL* input_kind)(const Op*, size_t);
    int(CALL* output_kind)(const Op*, size_t);
    int(CALL* memory_type)(const Op*, size_t);
    int(CALL* least_inputs)(const Op*);
    int(CALL* inputs_alike)(const Op*);
    int(CALL* least_outputs)(const Op*);
    int(CALL* outputs_alike)(const Op*);
    Status*(CALL* create_or_fail)(const Op*, Api, const Info*, void**);
    Status*(CALL* compute_or_fail)(void*, Kernel*);
    Function infer_shapes;
    int(CALL* first_version)(const Op*);
    int(CALL* last_version)(const Op*);
    Function may_inplace, release_may_inplace, alias_map, release_alias_map;
};

// --------------------------------------------------------------------------------------------------- the operator

constexpr int64_t FORMAT = 1;
constexpr size_t HEAD = 8, FIXED = 3;  // numbers of a layout before the shapes; inputs before the images
constexpr int64_t MOST_FLOATS = (int64_t)1 << 32, MOST_THREADS = 256;
constexpr int64_t MACS_A_THREAD = 1 << 23;  // as in engine.py

struct Failure {
    int code;
    std::string text;
};

// Zeroed floats on huge pages where the system has them, as in engine.py.
class Pages {
  public:
    explicit Pages(int64_t floats) {
        constexpr size_t huge = 1 << 21;
        size_ = (4 * (size_t)floats + huge - 1) / huge * huge + huge;
#ifdef __linux__
        start_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start_ == MAP_FAILED) throw std::bad_alloc();
        madvise(start_, size_, MADV_HUGEPAGE);
#else
        start_ = std::calloc(size_, 1);
        if (!start_) throw std::bad_alloc();
#endif
        const uintptr_t place = reinterpret_cast<uintptr_t>(start_);
        floats_ = reinterpret_cast<float*>((place + huge - 1) / huge * huge);
    }
    ~Pages() {
#ifdef __linux__
        munmap(start_, size_);
#else
        std::free(start_);
#endif
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    float* floats() const { return floats_; }

  private:
    void* start_;
    size_t size_;
    float* floats_;
};

std::string text_of(const std::vector<int64_t>& shape) {
    std::string text = "[N";
    for (int64_t size : shape) text += ", " + std::to_string(size);
    return text + "]";
}

class Chain {
  public:
    explicit Chain(Api api) : api_(api) {}

    void compute(Kernel* kernel) {
        std::call_once(read_, [&] { read(kernel); });
        const size_t inputs = in_.size(), outputs = out_.size();
        std::vector<const float*> from(inputs);
        std::vector<float*> to(outputs);
        int64_t images = 0;
        for (size_t i = 0; i < inputs; i++) {
            const Value* value = input(kernel, FIXED + i);
            std::vector<int64_t> shape = shape_of(value);
            const int64_t batch = shape.empty() ? -1 : shape[0];
            if (!shape.empty()) shape.erase(shape.begin());
            if (batch < 0 || shape != in_[i] || (i && batch != images))
                throw Failure{INVALID_ARGUMENT, "dspfx.Chain takes " + text_of(in_[i]) +
                                                    " as image " + std::to_string(i) + ", as many in each, and got " +
                                                    std::to_string(batch) + " of " + text_of(shape)};
            images = batch;
            from[i] = data<const float>(value);
        }
        for (size_t i = 0; i < outputs; i++) {
            std::vector<int64_t> shape = out_[i];
            shape.insert(shape.begin(), images);
            Value* value = nullptr;
            check(call<Status*>(api_, OUTPUT, kernel, i, (const int64_t*)shape.data(), shape.size(), &value));
            to[i] = data<float>(value);
        }
        std::unique_ptr<Pages> work = take();
        const int64_t worth = 1 + images * macs_ / MACS_A_THREAD;
        const int32_t threads = (int32_t)(worth < threads_ ? worth : threads_);
        Pool pool = {api_, kernel};
        dspfx_run_in(program_, first_, weights_, work->floats(), from.data(), to.data(), in_sizes_.data(),
                     out_sizes_.data(), images, threads, &Pool::run, &pool);
        std::lock_guard<std::mutex> hold(mutex_);
        spare_.push_back(std::move(work));
    }

  private:
    struct Pool {  // the session's own threads
        Api api;
        Kernel* kernel;
        static void run(void* pool, void (*work)(void*, size_t), size_t count, void* job) {
            const Pool* p = static_cast<Pool*>(pool);
            // Each does what work is left, so it is enough if one of them runs: whatever the status says, it did.
            if (call<Status*>(p->api, PARALLEL_FOR, (const Kernel*)p->kernel, work, count, (size_t)0, job)) work(job, 0);
        }
    };

    void check(Status* status) const {
        if (status) throw status;
    }

    const Value* input(Kernel* kernel, size_t index) const {
        const Value* value = nullptr;
        check(call<Status*>(api_, INPUT, (const Kernel*)kernel, index, &value));
        if (!value) throw Failure{INVALID_ARGUMENT, "dspfx.Chain lacks input " + std::to_string(index)};
        return value;
    }

    template <typename T, typename V>
    T* data(V* value) const {
        void* place = nullptr;
        check(call<Status*>(api_, TENSOR_DATA, const_cast<Value*>(value), &place));
        return static_cast<T*>(place);
    }

    std::vector<int64_t> shape_of(const Value* value) const {
        struct Shape;
        Shape* info = nullptr;
        check(call<Status*>(api_, TENSOR_INFO, value, &info));
        size_t axes = 0;
        call<Status*>(api_, AXIS_COUNT, (const Shape*)info, &axes);
        std::vector<int64_t> shape(axes);
        call<Status*>(api_, AXES, (const Shape*)info, shape.data(), axes);
        call<void>(api_, RELEASE_TENSOR_INFO, info);
        return shape;
    }

    // The first three inputs, which are constants of the file: their places hold as long as the session does.
    void read(Kernel* kernel) {
        const Value *program = input(kernel, 0), *weights = input(kernel, 1), *layout = input(kernel, 2);
        const std::vector<int64_t> size = shape_of(layout);
        const int64_t *numbers = data<const int64_t>(layout), count = size.size() == 1 ? size[0] : 0;
        if (count < (int64_t)HEAD || numbers[0] != FORMAT)
            throw Failure{FAIL, "dspfx.Chain was written by another version of dspfx; export the network again"};
        if (numbers[1] != dspfx_lanes())
            throw Failure{FAIL, "dspfx.Chain was written for vectors of " + std::to_string(numbers[1]) +
                                    " floats, and this library has " + std::to_string(dspfx_lanes()) +
                                    "; load the library that was exported with the file"};
        first_ = numbers[2], floats_ = numbers[3], macs_ = numbers[5];
        threads_ = numbers[4] ? numbers[4] : std::thread::hardware_concurrency();
        if (threads_ < 1) threads_ = 1;
        const int64_t *now = numbers + HEAD, *end = numbers + count;
        in_.clear(), out_.clear();
        for (auto* list : {&in_, &out_})
            for (int64_t i = 0; i < numbers[list == &in_ ? 6 : 7]; i++) {
                if (now >= end || *now < 0 || *now >= end - now) throw Failure{FAIL, "dspfx.Chain: the layout is cut off"};
                list->emplace_back(now + 1, now + 1 + *now);
                now += 1 + *now;
            }
        size_t images = 0, results = 0;
        check(call<Status*>(api_, INPUT_COUNT, (const Kernel*)kernel, &images));
        check(call<Status*>(api_, OUTPUT_COUNT, (const Kernel*)kernel, &results));
        if (images != FIXED + in_.size() || results != out_.size())
            throw Failure{FAIL, "dspfx.Chain has " + std::to_string(images - FIXED) + " images and " +
                                    std::to_string(results) + " results; its layout says " +
                                    std::to_string(in_.size()) + " and " + std::to_string(out_.size())};
        in_sizes_.clear(), out_sizes_.clear();
        for (auto& shape : in_) in_sizes_.push_back(product(shape));
        for (auto& shape : out_) out_sizes_.push_back(product(shape));
        program_ = data<const int32_t>(program);
        weights_ = data<const float>(weights);
        if (floats_ < 0 || floats_ > MOST_FLOATS || macs_ < 0 || threads_ > MOST_THREADS ||
            !dspfx_is_safe(program_, product(shape_of(program)), first_, product(shape_of(weights)), floats_,
                           in_sizes_.data(), (int64_t)in_.size(), out_sizes_.data(), (int64_t)out_.size()))
            throw Failure{FAIL, "dspfx.Chain: the program reaches outside of its memory; the file is damaged"};
    }

    static int64_t product(const std::vector<int64_t>& shape) {
        int64_t size = 1;
        for (int64_t n : shape)
            if (n < 0 || __builtin_mul_overflow(size, n, &size) || size > MOST_FLOATS)
                throw Failure{FAIL, "dspfx.Chain cannot have an image of " + text_of(shape)};
        return size;
    }

    std::unique_ptr<Pages> take() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            if (!spare_.empty()) {
                std::unique_ptr<Pages> work = std::move(spare_.back());
                spare_.pop_back();
                return work;
            }
        }
        return std::make_unique<Pages>(floats_);
    }

    Api api_;
    std::once_flag read_;
    const int32_t* program_ = nullptr;
    const float* weights_ = nullptr;
    int64_t first_ = 0, floats_ = 0, threads_ = 1, macs_ = 0;
    std::vector<std::vector<int64_t>> in_, out_;  // shapes of one image
    std::vector<int64_t> in_sizes_, out_sizes_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Pages>> spare_;  // a workspace for each call that ran at the same time as others
};

Api api_of_kernels = nullptr;  // the same for all sessions of a process

Status* status_of(const Failure& failure) {
    return call<Status*>(api_of_kernels, CREATE_STATUS, failure.code, failure.text.c_str());
}

Status* CALL compute(void* chain, Kernel* kernel) {
    try {
        static_cast<Chain*>(chain)->compute(kernel);
        return nullptr;
    } catch (Status* status) {
        return status;
    } catch (const Failure& failure) {
        return status_of(failure);
    } catch (const std::bad_alloc&) {
        return status_of({FAIL, "dspfx.Chain: there is not enough memory"});
    }
}

Status* CALL create(const Op*, Api api, const Info*, void** chain) {
    *chain = new (std::nothrow) Chain(api);
    return *chain ? nullptr : status_of({FAIL, "dspfx.Chain: there is not enough memory"});
}

const Op CHAIN = {
    API_VERSION,
    nullptr,
    [](const Op*) -> const char* { return "Chain"; },
    [](const Op*) -> const char* { return nullptr; },
    [](const Op*, size_t index) -> int { return index == 0 ? INT32 : index == 2 ? INT64 : FLOAT; },
    [](const Op*) -> size_t { return FIXED + 1; },
    [](const Op*, size_t) -> int { return FLOAT; },
    [](const Op*) -> size_t { return 1; },
    nullptr,
    [](void* chain) { delete static_cast<Chain*>(chain); },
    [](const Op*, size_t index) -> int { return index < FIXED ? REQUIRED : VARIADIC; },
    [](const Op*, size_t) -> int { return VARIADIC; },
    [](const Op*, size_t) -> int { return 0; },
    [](const Op*) -> int { return 1; },
    [](const Op*) -> int { return 1; },
    [](const Op*) -> int { return 1; },
    [](const Op*) -> int { return 1; },
    &create,
    &compute,
    nullptr,
    [](const Op*) -> int { return 1; },
    [](const Op*) -> int { return 0x7fffffff; },
    nullptr, nullptr, nullptr, nullptr,
};

// What this library was compiled for, in words, where the processor does not have it; else null.
const char* lacking() {
#if defined(__x86_64__) || defined(__i386__)
#ifdef __AVX512F__
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bw"))
        return "AVX-512";
#elif defined(__AVX2__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "AVX2";
#endif
#endif
    return nullptr;
}

}  // namespace

// What SessionOptions.register_custom_ops_library looks for.
extern "C" EXPORT Status* CALL RegisterCustomOps(Options* options, const ApiBase* base) {
    const Api first = base->get_api(1), api = base->get_api(API_VERSION);
    api_of_kernels = first;
    if (!api)
        return status_of({FAIL, std::string("dspfx.Chain needs ONNX Runtime 1.17 or newer, and this is ") +
                                    base->get_version()});
    if (const char* name = lacking())
        return status_of({FAIL, std::string("this library of dspfx needs a processor with ") + name +
                                    "; export the network for another one"});
    static std::mutex mutex;
    static Domain* domain = nullptr;
    std::lock_guard<std::mutex> hold(mutex);
    if (!domain) {
        Domain* made = nullptr;
        if (Status* status = call<Status*>(api, CREATE_DOMAIN, (const char*)"dspfx", &made)) return status;
        if (Status* status = call<Status*>(api, ADD_TO_DOMAIN, made, (const Op*)&CHAIN)) return status;
        domain = made;
    }
    return call<Status*>(api, ADD_DOMAIN, options, domain);
}
