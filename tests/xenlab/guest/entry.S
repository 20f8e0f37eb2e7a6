/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How the stub guest starts: Xen's PVH entry (docs/misc/pvh.pandoc: 32-bit protected mode, paging
 * off, %ebx points to the start info), then 64-bit mode, in which the memory below 1 GiB and that
 * from 3 to 4 GiB have their physical addresses. The page tables are memory as any other, so a
 * pager may take them away.
 */
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18              /* XEN_ELFNOTE_PHYS32_ENTRY, xen/include/public/elfnote.h */
    .asciz "Xen"
    .long start

    .text
    .code32
    .globl start
start:
    lgdt descriptors_at
    mov $0x20, %eax             /* CR4.PAE */
    mov %eax, %cr4
    mov $level4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx       /* EFER.LME */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax        /* CR0.PG */
    mov %eax, %cr0
    ljmp $8, $long_mode

    .code64
long_mode:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack_end, %esp
    mov %ebx, %edi
    xor %ebp, %ebp
    call run
    ud2

    .data
    .balign 8
descriptors:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff     /* code of 64 bits, data */
descriptors_at:
    .word . - descriptors - 1
    .long descriptors

    .macro large_pages from
    .set address, \from
    .rept 512
    .quad address | 0x83        /* present, writable, 2 MiB */
    .set address, address + 0x200000
    .endr
    .endm

    .balign 4096
level4:
    .quad level3 + 3
    .balign 4096
level3:
    .quad first_gib + 3, 0, 0, fourth_gib + 3
    .balign 4096
first_gib:
    large_pages 0
fourth_gib:
    large_pages 0xc0000000

    .bss
    .balign 4096
    .globl hypercall_page
hypercall_page:
    .skip 4096
    .skip 4096
stack_end:
