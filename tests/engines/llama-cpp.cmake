# What the tests need of llama.cpp is its library. What its programs share (arguments, chats, downloads) takes as long to
# compile again, and nothing of it is installed.
set(LLAMA_BUILD_COMMON OFF)
# The time of an answer is spent in ggml. Around it, -O1 compiles in two thirds of the time.
cmake_language(DEFER CALL target_compile_options llama PRIVATE -O1)
# GCC 12 takes a configuration of AMX's tiles for 8 bytes long, and leaves out the stores to its other 56: a crash.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  cmake_language(DEFER CALL target_compile_options ggml-cpu PRIVATE -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
