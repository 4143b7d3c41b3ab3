# What the tests need of llama.cpp is its library. What its programs share (arguments, chats, downloads) takes as long to
# compile again, and nothing of it is installed.
set(LLAMA_BUILD_COMMON OFF)
# The time of an answer is spent in ggml. Around it, -O1 compiles in two thirds of the time.
cmake_language(DEFER CALL target_compile_options llama PRIVATE -O1)
