// Counts what the kernels' own loads and stores move: linked where the kernels were compiled with -fsanitize=thread,
// whose calls end here and in no sanitizer.
//
// The n-th access of a warp's 32 lanes at one place in the code is one request. In global memory it is counted by
// 32-byte sectors, in shared memory by wavefronts over 32 banks of 4 bytes (accesses of 8 and 16 bytes go in 2 and 4
// phases). Ideal is one wavefront per phase.
#include "cuda_emulator.h"

#include <array>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace emulator {
namespace {

constexpr int kSector = 32, kBanks = 32, kWord = 4;

struct Access {
  const void* place;
  uint64_t address;
  uint16_t bytes;
  bool write, shared;
};

struct Side {  // of reads, or of writes
  uint64_t bytes = 0, requests = 0;
};

struct Sector {
  Side read, written;
  uint64_t reading_blocks = 0;
};

struct Shared {
  uint64_t wavefronts = 0, ideal = 0, requests = 0;
};

struct Counts {
  const void* kernel;
  Shape shape;
  uint64_t barriers = 0, requests = 0, footprint = 0;     // footprint: of the block that touches most sectors, in bytes
  uint64_t in_flight = 0;                                 // bytes that a block's threads waited for at once, at most
  std::map<std::pair<const void*, bool>, Shared> places;  // of shared memory: place in the code, is it written?
  std::unordered_map<uint64_t, Sector> sectors;
};

std::vector<Counts> launches;
std::vector<std::vector<Access>> logs;  // by thread of the blocks that run
std::vector<uint64_t> waited;           // by thread: the most bytes of copies that it waited for at once
bool counting = false;

struct Request {
  std::array<uint64_t, kWarp> address;
  uint32_t lanes = 0;
};
using Key = std::tuple<const void*, uint16_t, bool, bool, uint32_t>;  // place, bytes, write, shared, n

void count_shared(Shared& side, const Request& request, int bytes) {
  ++side.requests;
  const int phases = std::max(1, bytes / kWord), lanes = kWarp / phases;
  for (int first = 0; first < kWarp; first += lanes) {
    std::array<std::vector<uint64_t>, kBanks> words;
    size_t most = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      const uint64_t word = request.address[lane] / kWord, end = (request.address[lane] + bytes - 1) / kWord;
      for (uint64_t w = word; w <= end; ++w) {
        auto& bank = words[w % kBanks];
        if (std::find(bank.begin(), bank.end(), w) == bank.end()) bank.push_back(w);
        most = std::max(most, bank.size());
      }
    }
    side.wavefronts += most, side.ideal += most > 0;
  }
}

using Touched = std::unordered_map<uint64_t, bool>;  // sector -> was it read?

void count_global(Counts& counts, const Request& request, int bytes, bool write, Touched& touched) {
  std::map<uint64_t, uint32_t> sectors;  // -> which of its bytes
  for (int lane = 0; lane < kWarp; ++lane)
    if (request.lanes >> lane & 1)
      for (int byte = 0; byte < bytes; ++byte) {
        const uint64_t at = request.address[lane] + byte;
        sectors[at / kSector] |= 1u << (at % kSector);
      }
  ++counts.requests;
  for (const auto& [sector, mask] : sectors) {
    Sector& one = counts.sectors[sector];
    Side& side = write ? one.written : one.read;
    side.bytes += __builtin_popcount(mask), ++side.requests;
    touched[sector] |= !write;
  }
}

void count_warp(Counts& counts, size_t first_thread, Touched& touched) {
  std::map<Key, Request> requests;
  for (int lane = 0; lane < kWarp; ++lane) {
    std::map<std::tuple<const void*, uint16_t, bool, bool>, uint32_t> seen;
    for (const Access& a : logs[first_thread + lane]) {
      const uint32_t n = seen[{a.place, a.bytes, a.write, a.shared}]++;
      Request& request = requests[{a.place, a.bytes, a.write, a.shared, n}];
      request.address[lane] = a.address, request.lanes |= 1u << lane;
    }
    logs[first_thread + lane].clear();
  }
  for (const auto& [key, request] : requests) {
    const auto [place, bytes, write, shared, n] = key;
    if (shared)
      count_shared(counts.places[{place, write}], request, bytes);
    else
      count_global(counts, request, bytes, write, touched);
  }
}

void note(const void* place, const void* address, int bytes, bool write) {
  if (!counting || !running()) return;
  const Memory memory = memory_of(address);
  if (memory == Memory::kRegisters) return;
  const Place& p = here();
  const size_t thread = static_cast<size_t>(p.rank) * p.block_size.x + p.thread.x;
  if (logs.size() <= thread) logs.resize(thread + 1);
  logs[thread].push_back(
      {place, reinterpret_cast<uint64_t>(address), static_cast<uint16_t>(bytes), write, memory == Memory::kShared});
}

}  // namespace

void on_launch(const void* kernel, const Shape& shape) {
  if (counting) launches.push_back({kernel, shape});
}

void on_copy(const void* place, void* to, const void* from, int bytes, int given) {
  if (given) note(place, from, given, false);
  note(place, to, bytes, true);
}

void on_wait(int bytes) {
  if (!counting) return;
  const Place& p = here();
  const size_t thread = static_cast<size_t>(p.rank) * p.block_size.x + p.thread.x;
  if (waited.size() <= thread) waited.resize(thread + 1);
  waited[thread] = std::max<uint64_t>(waited[thread], bytes);
}

Shared all_of(const Counts& counts, bool write) {
  Shared all;
  for (const auto& [place, s] : counts.places)
    if (place.second == write) all.wavefronts += s.wavefronts, all.ideal += s.ideal, all.requests += s.requests;
  return all;
}

void on_blocks_ended(int barriers) {
  if (!counting) return;
  Counts& counts = launches.back();
  counts.barriers += barriers;
  for (size_t first = 0; first < logs.size(); first += counts.shape.threads) {
    Touched touched;
    for (size_t warp = first; warp < std::min(logs.size(), first + counts.shape.threads); warp += kWarp) {
      if (logs.size() < warp + kWarp) logs.resize(warp + kWarp);
      count_warp(counts, warp, touched);
    }
    uint64_t in_flight = 0;
    for (size_t t = first; t < std::min(waited.size(), first + counts.shape.threads); ++t) in_flight += waited[t];
    counts.in_flight = std::max(counts.in_flight, in_flight);
    for (const auto& [sector, read] : touched) counts.sectors[sector].reading_blocks += read;
    counts.footprint = std::max<uint64_t>(counts.footprint, touched.size() * kSector);
  }
  waited.clear();
}

}  // namespace emulator

// ---- what the compiler calls ------------------------------------------------------------------------------------

#define NOTE(WRITE, BYTES) emulator::note(__builtin_return_address(0), address, BYTES, WRITE)
#define ACCESSES(BYTES)                                                    \
  void __tsan_read##BYTES(void* address) { NOTE(false, BYTES); }           \
  void __tsan_write##BYTES(void* address) { NOTE(true, BYTES); }           \
  void __tsan_unaligned_read##BYTES(void* address) { NOTE(false, BYTES); } \
  void __tsan_unaligned_write##BYTES(void* address) { NOTE(true, BYTES); } \
  void __tsan_volatile_read##BYTES(void* address) { NOTE(false, BYTES); }  \
  void __tsan_volatile_write##BYTES(void* address) { NOTE(true, BYTES); }

extern "C" {
void __tsan_init() {}
void __tsan_read_range(void* address, size_t bytes) { NOTE(false, static_cast<int>(bytes)); }
void __tsan_write_range(void* address, size_t bytes) { NOTE(true, static_cast<int>(bytes)); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
}

// ---- what Python asks -------------------------------------------------------------------------------------------

#pragma GCC visibility push(default)
extern "C" {

// From here on, until it is called with 0; what was counted before is forgotten.
void traffic_count(int on) {
  emulator::counting = on;
  if (on) emulator::launches.clear(), emulator::logs.clear(), emulator::waited.clear();
}

int traffic_launches() { return static_cast<int>(emulator::launches.size()); }

// kernel, blocks, threads, shared bytes, barriers, global requests, footprint, then wavefronts, ideal, requests of
// shared reads and of shared writes, bytes in flight, number of sectors
void traffic_launch(int index, uint64_t* out) {
  const emulator::Counts& c = emulator::launches.at(index);
  const dim3& b = c.shape.blocks;
  const emulator::Shared read = emulator::all_of(c, false), written = emulator::all_of(c, true);
  const uint64_t values[] = {reinterpret_cast<uint64_t>(c.kernel),
                             static_cast<uint64_t>(b.x) * b.y * b.z,
                             c.shape.threads,
                             c.shape.shared_bytes,
                             c.barriers,
                             c.requests,
                             c.footprint,
                             read.wavefronts,
                             read.ideal,
                             read.requests,
                             written.wavefronts,
                             written.ideal,
                             written.requests,
                             c.in_flight,
                             c.sectors.size()};
  memcpy(out, values, sizeof(values));
}

int traffic_places(int index) { return static_cast<int>(emulator::launches.at(index).places.size()); }

// By place: its address, is it written?, wavefronts, ideal, requests
void traffic_place(int index, uint64_t* out) {
  for (const auto& [place, s] : emulator::launches.at(index).places) {
    const uint64_t values[] = {reinterpret_cast<uint64_t>(place.first), place.second, s.wavefronts, s.ideal,
                               s.requests};
    memcpy(out, values, sizeof(values));
    out += 5;
  }
}

// By sector: its address, bytes and requests that read it, the same of writes, how many blocks read it
void traffic_sectors(int index, uint64_t* out) {
  for (const auto& [sector, s] : emulator::launches.at(index).sectors) {
    const uint64_t values[] = {sector * emulator::kSector, s.read.bytes,    s.read.requests, s.written.bytes,
                               s.written.requests,         s.reading_blocks};
    memcpy(out, values, sizeof(values));
    out += 6;
  }
}
}
