// The floor for UFFDIO_COPY: a loop that waits for a fault, reads its page and copies
// it, and does nothing else. A thread for each VMM, which shakes hands as with any page
// server and has one region of 4 KiB pages and one vCPU. With "mapped" it reads
// nothing: it has the whole file in its memory before, and holds it there.
//
//     loop SOCKET MEM_FILE [mapped]
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int file;
static const char *memory; // or NULL

struct vmm {
	int uffd;
	uint64_t addr, offset;
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *serve(void *arg)
{
	struct vmm v = *(struct vmm *)arg;
	free(arg);
	char *buf = aligned_alloc(4096, 4096);
	if (!buf)
		fail("aligned_alloc");
	for (;;) {
		struct uffd_msg msg;
		if (read(v.uffd, &msg, sizeof msg) != sizeof msg)
			fail("read userfaultfd");
		if (msg.event != UFFD_EVENT_PAGEFAULT)
			continue;
		uint64_t page = msg.arg.pagefault.address & ~4095ull;
		uint64_t at = page - v.addr + v.offset;
		if (!memory && pread(file, buf, 4096, at) != 4096)
			fail("read memory file");
		struct uffdio_copy copy = {
			.dst = page,
			.src = (uint64_t)(uintptr_t)(memory ? memory + at : buf),
			.len = 4096,
		};
		if (ioctl(v.uffd, UFFDIO_COPY, &copy)) {
			if (errno == ESRCH)
				return NULL; // the VMM has ended
			fail("UFFDIO_COPY");
		}
	}
}

static uint64_t field(const char *json, const char *name)
{
	const char *at = strstr(json, name);
	if (!at || !(at = strchr(at, ':'))) {
		fprintf(stderr, "no %s in the handshake: %s\n", name, json);
		exit(1);
	}
	return strtoull(at + 1, NULL, 10);
}

static void accept_vmm(int conn)
{
	char json[4096];
	union {
		struct cmsghdr align;
		char buf[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {json, sizeof json - 1};
	struct msghdr m = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control.buf, .msg_controllen = sizeof control.buf,
	};
	ssize_t n = recvmsg(conn, &m, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;
	if (!c || c->cmsg_type != SCM_RIGHTS)
		fail("receive handshake");
	json[n] = 0;
	struct vmm *v = malloc(sizeof *v);
	memcpy(&v->uffd, CMSG_DATA(c), sizeof v->uffd);
	v->addr = field(json, "\"base_host_virt_addr\"");
	v->offset = field(json, "\"offset\"");
	// It came not blocking; one system call a wait is less than two.
	if (fcntl(v->uffd, F_SETFL, fcntl(v->uffd, F_GETFL) & ~O_NONBLOCK))
		fail("fcntl");
	pthread_t thread;
	if (pthread_create(&thread, NULL, serve, v))
		fail("pthread_create");
}

int main(int argc, char **argv)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	if (argc < 3 || argc > 4 || strlen(argv[1]) >= sizeof addr.sun_path) {
		fprintf(stderr, "usage: loop SOCKET MEM_FILE [mapped]\n");
		return 2;
	}
	file = open(argv[2], O_RDONLY | O_CLOEXEC);
	struct stat st;
	if (file < 0 || fstat(file, &st))
		fail(argv[2]);
	if (argc == 4) {
		memory = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
		if (memory == MAP_FAILED)
			fail("mmap");
	}
	strcpy(addr.sun_path, argv[1]);
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&addr, sizeof addr) || listen(listener, 128))
		fail(argv[1]);
	for (;;) {
		int conn = accept(listener, NULL, NULL); // stays open, as VMMs may watch it
		if (conn < 0)
			fail("accept");
		accept_vmm(conn);
	}
}
