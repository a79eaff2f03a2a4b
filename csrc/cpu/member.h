// A thread's place in a team (team.h); without one it is alone.
#pragma once
#include <cstdint>

namespace fusedrnn {

class Team;

struct Member {
  Team* team = nullptr;
  int64_t index = 0, count = 1;
  int64_t met = 0;

  // Returns once all members have called it as often: what they wrote before can be read.
  void meet();
};

}  // namespace fusedrnn
