/* A data-plane container that tries what it must not be able to do. One line for
   each: "NAME: ok" if it went, else "NAME: " and why it did not. It runs in the
   place of a client of the chart, with that client's mounts and rights. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static void tell(const char *name, int failed) {
    printf("%s: %s\n", name, failed ? strerror(errno) : "ok");
    fflush(stdout);
}

static int connect_to(const char *path, int type) {
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    if (strlen(path) >= sizeof at.sun_path) {
        errno = ENAMETOOLONG;
        return 1;
    }
    strcpy(at.sun_path, path);
    return fd < 0 || connect(fd, (struct sockaddr *)&at, sizeof at);
}

/* How many processes of this name there are, and whether the descriptors of any can
   be listed. */
static void look_for(const char *wanted) {
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    int seen = 0, listed = 0;
    while (proc && (entry = readdir(proc))) {
        char path[300], name[64] = "";
        FILE *comm;
        DIR *fds;
        if (entry->d_name[0] < '0' || entry->d_name[0] > '9')
            continue;
        snprintf(path, sizeof path, "/proc/%s/comm", entry->d_name);
        if ((comm = fopen(path, "r"))) {
            if (fscanf(comm, "%63s", name) != 1)
                name[0] = 0;
            fclose(comm);
        }
        if (strcmp(name, wanted))
            continue;
        seen++;
        snprintf(path, sizeof path, "/proc/%s/fd", entry->d_name);
        if ((fds = opendir(path))) {
            listed++;
            closedir(fds);
        }
    }
    printf("processes called %s: %d seen, descriptors of %d\n", wanted, seen, listed);
}

static char path[4200];

static const char *in(const char *dir, const char *name) {
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

int main(int argc, char **argv) {
    const char *dir;
    if (argc != 2) {
        fprintf(stderr, "usage: intruder RUNTIME_DIR\n");
        return 2;
    }
    dir = argv[1];
    /* What it may: else the rest would prove nothing. */
    tell("connect to public/api.sock", connect_to(in(dir, "public/api.sock"), SOCK_STREAM));
    tell("connect to public/fd.sock", connect_to(in(dir, "public/fd.sock"), SOCK_SEQPACKET));
    tell("create a file in public", open(in(dir, "public/intruder"), O_CREAT | O_WRONLY, 0600) < 0);
    tell("make a directory in public", mkdir(in(dir, "public/intruder.d"), 0700));
    tell("unlink public/api.sock", unlink(in(dir, "public/api.sock")));
    tell("change the mode of public/api.sock", chmod(in(dir, "public/api.sock"), 0777));
    tell("connect to admin/admin.sock", connect_to(in(dir, "admin/admin.sock"), SOCK_STREAM));
    tell("connect to public/../admin/admin.sock", connect_to(in(dir, "public/../admin/admin.sock"), SOCK_STREAM));
    tell("create a file in the root", open("/intruder", O_CREAT | O_WRONLY, 0600) < 0);
    tell("become root", setuid(0));
    look_for("domaind");
    return 0;
}
